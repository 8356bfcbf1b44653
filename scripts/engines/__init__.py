"""``make test-engines``: artifacts of a real model, read by other engines in environments of their own.

`check` runs it, `plan` says which target goes to which engine, `agreement` judges, `page` writes docs/targets.md.
The ``read_*`` files and ``quantize_llama_cpp`` run in an engine's environment, so they import neither this package nor
qconv (but for ``read_qconv``); `exchange` is what they share. `importance` judges what llama.cpp's quantizer makes with
our importance matrix; `vocabularies` trains small SentencePiece models.
"""
