"""One file a schema revision, oldest first by number. A revision that was released is never edited."""
