"""`LanguageModel`: a model that knows where it came from, and so how to count, save and sample itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from jaxlora import lora
from jaxlora.adapters import Shelf, check_shares_base, put_adapter, take_adapter, weighted_adapter
from jaxlora.completion import RequestOutput
from jaxlora.config import LoraConfig
from jaxlora.converters import peft
from jaxlora.converters.export import MergeReport, export_base, save_merged, save_model
from jaxlora.converters.gguf import GGUFSource
from jaxlora.engine import Engine
from jaxlora.generate import generate
from jaxlora.hub import resolve_path
from jaxlora.model import CausalLM
from jaxlora.sampling import SamplingParams


class LanguageModel(CausalLM):
    """A `CausalLM` that knows where it came from, and so how to count, save and sample itself.

    name_or_path: what `from_pretrained` was given for the base model; base_folder: where its files lie (a folder, or a
    .gguf file), "" for a model made in memory; max_seq_length: the window in tokens; lora_config: the adapter's, or
    None. revision: of the base model on the hub, None for its newest. full_finetuning: whether every weight learns.
    engine: what `fast_generate` runs on, None without `fast_inference=True`.
    """

    name_or_path: str = ""
    base_folder: str = ""
    revision: str | None = None
    max_seq_length: int = 0
    lora_config: LoraConfig | None = None
    full_finetuning: bool = False
    engine: Engine | None = None
    _shelf: Shelf | None = None
    _generation_config: str = "{}"  # text, because a graphdef's attributes must hash

    @property
    def generation_config(self) -> dict:
        """The checkpoint's generation_config.json, {} if it has none: `generate` takes its stop tokens from here."""
        return json.loads(self._generation_config)

    @property
    def writes_base(self) -> bool:
        """Whether saving an adapter writes the base out as well: PEFT reads no GGUF file."""
        return self.base_folder.endswith(".gguf") and not self.full_finetuning

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter that the model computes with, "default" unless another was given; None without."""
        if self._shelf is not None:
            return self._shelf.active
        return "default" if lora.adapters(self) else None

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters, the active one first."""
        waiting = [] if self._shelf is None else list(self._shelf.waiting)
        return [*([] if self.active_adapter is None else [self.active_adapter]), *waiting]

    def load_adapter(self, model_id: str | Path, adapter_name: str, **hub: Any) -> None:
        """Read another adapter, from a folder or the hub, under a name. The active one stays active, if there is one.

        Args:
            hub: token, revision, cache_dir, local_files_only; see `FastLanguageModel.from_pretrained`.

        Raises:
            ValueError: there is one of this name, or one that changed the base's weights.
            CheckpointError: see `converters.peft.load_adapter`.
        """
        folder = resolve_path(model_id, **hub)
        config = peft.read_config(self, folder)
        self._check_new(adapter_name, config)
        self._add(adapter_name, lambda: peft.load_adapter(self, folder))

    def add_adapter(
        self,
        adapter_name: str,
        config: LoraConfig,
        random_state: int = 3407,
        init_dataset: Any = None,
    ) -> None:
        """Make another fresh adapter, under a name. The active one stays active, if there is one.

        Args:
            init_dataset: for "eva"; see `FastLanguageModel.get_peft_model`.

        Raises:
            ValueError: there is one of this name, one that changed the base's weights; and see `lora.add_adapters`.
        """
        self._check_new(adapter_name, config)
        key = jax.random.key(random_state)
        self._add(adapter_name, lambda: lora.add_adapters(self, config, key, init_dataset))

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add up adapters by their names into a new one; see `jaxlora.adapters.weighted_adapter`."""
        self._check_new(adapter_name, None)
        active, shelf = self._put_away(), self._shelf
        assert shelf is not None
        try:
            parts = [shelf.waiting[name] for name in map(self._known, adapters)]
            shelf.waiting[adapter_name] = weighted_adapter(self, parts, weights, combination_type, svd_rank)
        finally:
            self._activate(active)

    def set_adapter(self, adapter_name: str) -> None:
        """Compute with, and train, the adapter of this name. Train states and programs made before are of the other.

        Raises:
            ValueError: there is none of this name.
        """
        if self._known(adapter_name) != self.active_adapter:
            self._put_away()
            self._activate(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it is the active one, the first of the others becomes active.

        Raises:
            ValueError: there is none of this name.
        """
        active = self.active_adapter
        self._known(adapter_name)
        self._put_away()
        assert self._shelf is not None
        del self._shelf.waiting[adapter_name]
        self._activate(active if active != adapter_name else next(iter(self._shelf.waiting), None))

    def _known(self, name: str) -> str:
        if name not in self.adapter_names:
            raise ValueError(f"there is no adapter {name!r}: the model has {', '.join(self.adapter_names) or 'none'}")
        return name

    def _check_new(self, name: str, config: LoraConfig | None) -> None:
        if name in self.adapter_names:
            raise ValueError(f"there is an adapter {name!r} already: choose another name, or delete_adapter it")
        if self.full_finetuning:
            raise ValueError("a fully fine-tuned model takes no adapters: save it, and load the result")
        for owner in (config, self.lora_config):
            if owner is not None and (self.active_adapter is not None or owner is not config):
                check_shares_base(owner)

    def _add(self, name: str, make: Callable[[], LoraConfig]) -> None:
        """Put what `make` puts on the bare model on the shelf; without an active adapter it becomes active."""
        active = self._put_away()
        try:
            config = make()
            assert self._shelf is not None
            if active is None:
                self._shelf.active, self.lora_config = name, config
            else:
                self._shelf.waiting[name] = take_adapter(self, config)
        finally:
            if active is not None:
                self._activate(active)

    def _put_away(self) -> str | None:
        """Take the active adapter off, to the others; returns its name."""
        active = self.active_adapter
        shelf = self._shelf = Shelf() if self._shelf is None else self._shelf
        if active is not None:
            assert self.lora_config is not None
            shelf.waiting[active] = take_adapter(self, self.lora_config)
        shelf.active = self.lora_config = None
        return active

    def _activate(self, name: str | None) -> None:
        assert self._shelf is not None
        if name is not None:
            adapter = self._shelf.waiting.pop(name)
            put_adapter(self, adapter)
            self._shelf.active, self.lora_config = name, adapter.config

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all), as PEFT counts them."""
        return lora.get_nb_trainable_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line, such as `trainable params: 41,943,040 || all params: 8,072,204,288 || trainable%:
        0.5196`."""
        print(lora.format_trainable_parameters(*self.get_nb_trainable_parameters()))

    def generate(self, input_ids: Any, **options: Any) -> Int[Array, "b total"]:
        """Continue prompts; see `jaxlora.generate.generate`."""
        return generate(self, input_ids, **options)

    def fast_generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: str | Path | None = None,
    ) -> list[RequestOutput]:
        """Continue many prompts at once, with vLLM's names; see `engine.Engine.generate` and `sampling.SamplingParams`.

        Args:
            lora_request: a folder of PEFT files, whose adapter goes on in place of the model's own, in this call only.
                None is the model as it is, its adapter included.

        Raises:
            ValueError: the model was loaded without `fast_inference=True`; an adapter of a rank above `max_lora_rank`;
                a `lora_request` where the model's own adapter took its start out of the base weights; and see
                `engine.Engine.generate`.
        """
        if self.engine is None:
            raise ValueError("fast_generate needs the engine: load the model with fast_inference=True, or use generate")
        model = self if lora_request is None else _with_adapter_of(self, lora_request)
        return self.engine.generate(model, prompts, sampling_params)

    def save_pretrained(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        *,
        base_folder: str | Path | None = None,
        base_dtype: str | None = None,
    ) -> None:
        """Write the adapter in PEFT's layout, and the tokenizer if given; see `converters.peft.save_adapter`.

        PEFT loads the base model that the adapter names. It reads no GGUF file, so the model of one is written out as
        well: once, as a Hugging Face checkpoint in `base_folder`, by default the folder "base" in `save_directory`. A
        later save that names the same `base_folder` finds it there.

        With full fine-tuning there is no adapter, and the whole model is written as a Hugging Face checkpoint, every
        weight in the dtype that it is trained in; see `converters.export.save_model`.

        Args:
            base_folder: for a GGUF base only: where it is written to.
            base_dtype: for a GGUF base only: "float32", "bfloat16" or "float16"; None keeps the file's dtypes,
                quantised weights as float32. See `converters.export.export_base`.

        Raises:
            ValueError: the model has no adapter and was not fully fine-tuned, or it has no GGUF base and yet a
                `base_folder` or `base_dtype`.
            OSError: a folder cannot be written to.
        """
        if self.full_finetuning:
            if base_folder is not None or base_dtype is not None:
                raise ValueError("base_folder and base_dtype are for adapters, and this model is fully fine-tuned")
            save_model(self, save_directory, tokenizer, generation_config=self.generation_config)
            return
        if self.lora_config is None:
            raise ValueError("the model has no adapter to save: call FastLanguageModel.get_peft_model first")
        base = self.name_or_path
        if self.writes_base:
            folder = Path(save_directory) / "base" if base_folder is None else base_folder
            base = str(export_base(GGUFSource(self.base_folder), folder, dtype=base_dtype))
        elif base_folder is not None or base_dtype is not None:
            raise ValueError(f"base_folder and base_dtype are for a GGUF base; this model's base is {base}")
        peft.save_adapter(self, save_directory, tokenizer, config=self.lora_config, base=base, revision=self.revision)

    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        *,
        base: str | Path | None = None,
        **options: Any,
    ) -> MergeReport | None:
        """Write the model with its adapter merged as a Hugging Face checkpoint; see `converters.export.save_merged`.

        A fully fine-tuned model has nothing to merge: "merged_16bit" writes it as `save_pretrained` does, float32
        weights rounded to the model's compute dtype.

        Args:
            save_method: "merged_16bit", "merged_4bit" (NF4, for transformers with bitsandbytes), or "lora" for
                `save_pretrained`, which takes its own options and returns None.
            base: the checkpoint to merge onto, a folder, a .gguf file or an id; by default the one that was loaded. A
                model loaded from a 4-bit checkpoint needs the 16-bit original here.

        Raises:
            ValueError: the model was made in memory, and no `base` is given; and see `save_merged`.
        """
        if self.full_finetuning:
            if save_method != "merged_16bit" or base is not None:
                raise ValueError('a fully fine-tuned model has no adapter: save_method must be "merged_16bit", no base')
            save_model(
                self, save_directory, tokenizer, dtype=self.dtype, generation_config=self.generation_config, **options
            )
            return None
        if save_method == "lora":
            return self.save_pretrained(save_directory, tokenizer, **options)
        path = resolve_path(base) if base is not None else Path(self.base_folder)
        if base is None and not self.base_folder:
            raise ValueError("the model was made in memory and has no base checkpoint to merge onto: pass base=...")
        return save_merged(self, save_directory, tokenizer, base=path, save_method=save_method, **options)


def _with_adapter_of(model: LanguageModel, folder: str | Path) -> LanguageModel:
    """A copy that shares the base weights and has the adapter of a folder in place of its own."""
    if model.lora_config is not None and model.lora_config.changes_base:
        raise ValueError(
            f"lora_request={str(folder)!r} is for the base weights, and the model's own adapter "
            f"(init_lora_weights={model.lora_config.init_lora_weights!r}) has changed those: load the base anew"
        )
    copy = nnx.merge(*nnx.split(model))
    lora.remove_adapters(copy)
    copy.lora_config = peft.load_adapter(copy, folder)
    return copy
