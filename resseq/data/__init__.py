"""Text or images in, batches out: the only part of resseq that imports `datasets` and `tokenizers`.

`prepare` gives all of it at once. `load_text` and `load_images` give inputs and labels; a reader (one for each task)
encodes them, for texts by `train_tokenizer` and `encode`; `LengthBatches` and `collate` or `stack` make batches.
"""
