"""Small real tokenizers, made on the spot."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SENTENCE = (
    "the quick brown fox jumps over the lazy dog. 你好，世界！流水席不等人。 안녕하세요 여러분 "
    "naïve café Ünïcödé 👩‍👩‍👧‍👦 🎉🎊 the them then there  two   spaces\n\ttabs\nnew lines don't stop stopping "
) * 3


def byte_level(vocab_size: int = 330) -> Tokenizer:
    """GPT-2 style: byte-level BPE with real merges, two special tokens, one added token that is not special."""
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|eos|>", "<|bos|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE], trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


def sentencepiece_like(*, metaspace: bool = False) -> Tokenizer:
    """Llama-2 style: ▁ for space, byte fallback, the leading space stripped."""
    words = ["▁", "▁the", "▁quick", "▁fox", "fox", "s", "the", "▁▁", "▁▁▁", "▁a", "b", ".", ",", "你", "好", "\n", "é"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=pieces[0]))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if metaspace:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return tokenizer


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "fox", "##es", "##s", "run", "##ning", ".", ",", "don", "'", "t", "n't"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token=words[0]))
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
