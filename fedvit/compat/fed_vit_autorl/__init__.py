"""The names under which the runbook knows fedvit: ``fed_vit_autorl.db`` and ``fed_vit_autorl.privacy``.

Installed as a package of its own. Both modules work on the state folder of the environment's settings and never make
one: they are questions.
"""
