"""``make test-engines``: artifacts of a real model, read by other engines in environments of their own.

`check` runs it, `plan` says which target goes to which engine, `agreement` judges, `page` writes docs/targets.md.
The ``read_*`` files run in an engine's environment, so they import neither this package nor qconv (but for
``read_qconv``); `exchange` is what they share.
"""
