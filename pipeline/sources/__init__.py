"""Where data and models come from, pinned by content, and the files of records in them.

It imports core. What a row or a model means is decided elsewhere: in prepare, and in fetch.
"""
