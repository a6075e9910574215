"""Our wrappers around Unsloth's real loaders, as far as a CPU can tell; to be imported after Unsloth."""

import inspect


def report() -> dict:
    from accelerate_unsloth.engines import unsloth as engine

    built = []

    class Cache:
        def _set_cos_sin_cache(self, seq_len, device, dtype):
            built.append(str(device))

    Cache._set_cos_sin_cache = engine.only_on_own_gpu(Cache._set_cos_sin_cache, own_index=1)
    for device in ("cuda:0", "cuda:1", "cuda:2", "cpu"):
        Cache()._set_cos_sin_cache(8, device, None)
    pairs = (
        (engine.FastLanguageModel, engine.unsloth.FastLanguageModel),
        (engine.FastModel, engine.unsloth.FastModel),
    )
    return {
        "built": built,
        "same_signature": [
            inspect.signature(getattr(ours, name)) == inspect.signature(getattr(theirs, name))
            for ours, theirs in pairs
            for name in ("from_pretrained", "get_peft_model")
        ],
        "inherited": engine.FastLanguageModel.for_inference is engine.unsloth.FastLanguageModel.for_inference,
    }
