"""The promises of each port as a class of tests; an implementation's test class inherits them and provides fixtures."""
