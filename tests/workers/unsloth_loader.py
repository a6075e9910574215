"""Our wrappers around Unsloth's real loaders, as far as a CPU can tell: printed as JSON."""

import inspect
import json
import os

os.environ["UNSLOTH_ALLOW_CPU"] = "1"
from accelerate_unsloth.engines import unsloth as engine


class Cache:
    def _set_cos_sin_cache(self, seq_len, device, dtype):
        built.append(str(device))


built = []
Cache._set_cos_sin_cache = engine.only_on_own_gpu(Cache._set_cos_sin_cache, own_index=1)
for device in ("cuda:0", "cuda:1", "cuda:2", "cpu"):
    Cache()._set_cos_sin_cache(8, device, None)

print()
print(
    json.dumps(
        {
            "built": built,
            "same_signature": [
                inspect.signature(getattr(ours, name)) == inspect.signature(getattr(theirs, name))
                for ours, theirs in (
                    (engine.FastLanguageModel, engine.unsloth.FastLanguageModel),
                    (engine.FastModel, engine.unsloth.FastModel),
                )
                for name in ("from_pretrained", "get_peft_model")
            ],
            "inherited": engine.FastLanguageModel.for_inference is engine.unsloth.FastLanguageModel.for_inference,
        }
    )
)
