"""Read activations of a Hugging Face model at hook points, paying only for the layers that are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from services.residency.families import Family, Tap, base_model, locate
from services.residency.layouts import Cut

Take = Callable[[Tensor], Tensor]
See = Callable[[Tensor], Tensor | None]
Watch = Callable[[str, Tensor], None]


class _Enough(Exception):
    """Every wanted tensor of this forward pass is recorded."""


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """x/rms(x) of an RMS norm, (x-mean)/std of a LayerNorm, without gain and bias.

    Computed in float32 as the norm itself does, so that `normalize(norm, x) * gain` is bit for bit the RMS norm's
    output in float32. x: [..., d]; returns x's dtype.
    """
    eps = next(value for name in ("variance_epsilon", "eps") if (value := getattr(norm, name, None)) is not None)
    wide = x.float()
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def first_tensor(value: object) -> Tensor:
    """The hidden states in a module's output or arguments, which may be a tuple that starts with them."""
    while isinstance(value, tuple | list):
        value = value[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"expected hidden states, got {type(value).__name__}")
    return value


def on_input(module: nn.Module, see: See) -> torch.utils.hooks.RemovableHandle:
    """Call `see` with the hidden states that `module` is given; a tensor it returns takes their place."""

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        changed = see(first_tensor(args) if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, see: See) -> torch.utils.hooks.RemovableHandle:
    """Call `see` with the hidden states that `module` returns; a tensor it returns takes their place."""

    def hook(_: nn.Module, __: tuple, output: object) -> object:
        changed = see(first_tensor(output))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook)


def on_pattern(module: nn.Module, see: See) -> torch.utils.hooks.RemovableHandle:
    """Call `see` with the attention pattern that `module` returns, [B, queries, heads, keys]."""

    def hook(_: nn.Module, __: tuple, output: object) -> None:
        pattern = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(pattern, Tensor):
            raise TypeError(f"{type(module).__name__} returned no attention pattern; is its attention eager?")
        see(pattern.transpose(1, 2))

    return module.register_forward_hook(hook)


def attach(module: nn.Module, tap: Tap, see: See) -> torch.utils.hooks.RemovableHandle:
    """Hook one tensor of a module. A normalized tensor and a pattern can only be read: nothing uses them afterwards.

    Raises:
        ValueError: `see` wants to replace a tensor that can only be read.
    """

    def read_only(x: Tensor) -> None:
        if see(x) is not None:
            raise ValueError("the sites ln2_normalized and pattern can be read, not replaced")

    if tap.side == "normalized":
        return on_input(module, lambda x: read_only(normalize(module, x)))
    if tap.side == "pattern":
        return on_pattern(module, read_only)
    return (on_output if tap.side == "output" else on_input)(module, see if tap.cut is None else _part(tap.cut, see))


def _part(cut: Cut, see: See) -> See:
    def see_part(whole: Tensor) -> Tensor | None:
        new = see(cut.get(whole))
        return None if new is None else cut.put(whole, new)

    return see_part


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """The model computes its attention patterns inside the block; other kernels never form them."""
    config = base_model(model).config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def position_ids(attention_mask: Tensor) -> Tensor | None:
    """Positions that count from each row's first real token, or None where rows start with one (right padding).

    A left-padded row without them is silently wrong on models with learned positions. Both [B, S], int64.
    """
    if bool(attention_mask[:, 0].all()):
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def forward_arguments(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor | bool]:
    """Keyword arguments of a plain forward pass: no KV cache, no mask where nothing is masked."""
    arguments: dict[str, Tensor | bool] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None and not bool(attention_mask.all()):
        arguments["attention_mask"] = attention_mask
        positions = position_ids(attention_mask)
        if positions is not None:
            arguments["position_ids"] = positions
    return arguments


class Capture:
    """The open hooks of one `capture_hooks` block."""

    def __init__(self, model: nn.Module, hook_points: Sequence[str]) -> None:
        self._model = model
        self._hook_points = tuple(dict.fromkeys(hook_points))
        self._seen: set[str] = set()
        self._watcher: Watch | None = None
        self.tensors: dict[str, Tensor] = {}
        """What the latest forward pass left, by hook point, [B, S, d]; whoever runs the model itself reads this."""

    def _record(self, hook_point: str, tensor: Tensor) -> None:
        if self._watcher is None:
            self.tensors[hook_point] = tensor
            return
        self._watcher(hook_point, tensor)
        self._seen.add(hook_point)
        if len(self._seen) == len(self._hook_points):
            raise _Enough

    def watch(self, input_ids: Tensor, attention_mask: Tensor | None, watcher: Watch) -> None:
        """Forward one batch up to the deepest hook point.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S], 1 on real tokens; None when all are.
            watcher: is given each hook point's name and tensor, [B, S, d] in the model's dtype and on its device, the
                moment it is there, in inference mode. It must copy what it keeps: some models go on to change a tensor
                in place.
        """
        self._seen.clear()
        self._watcher = watcher
        try:
            with torch.inference_mode():
                self._model(**forward_arguments(input_ids, attention_mask))
        except _Enough:
            pass
        finally:
            self._watcher = None

    def run(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, take: Take = torch.clone
    ) -> dict[str, Tensor]:
        """Forward one batch up to the deepest hook point.

        Args:
            input_ids: as for `watch`.
            attention_mask: as for `watch`.
            take: makes of each [B, S, d] tensor what is handed out, and must copy; for example a selection by mask. It
                runs outside inference mode, so that what it returns may be saved for a backward pass.

        Returns:
            Hook point to tensor, in the order they were asked for; the model's dtype and device.
        """
        taken: dict[str, Tensor] = {}

        def keep(hook_point: str, tensor: Tensor) -> None:
            with torch.inference_mode(False):
                taken[hook_point] = take(tensor)

        self.watch(input_ids, attention_mask, keep)
        return {hook_point: taken[hook_point] for hook_point in self._hook_points}


@contextmanager
def capture_hooks(model: nn.Module, family: Family, hook_points: Sequence[str]) -> Iterator[Capture]:
    """Hook a model for reading; on the way out, also by an exception, every hook is gone again.

    Use `capture.run(ids, mask)`, which stops behind the deepest hook point (no further layers, no unembedding, no KV
    cache), or run the model oneself and read `capture.tensors`.

    Raises:
        UnknownHookPoint: a name does not exist in this model; nothing was hooked.
    """
    places = {hook_point: locate(model, family, hook_point) for hook_point in hook_points}
    capture = Capture(model, hook_points)
    with ExitStack() as stack:
        stack.callback(capture.tensors.clear)
        if any(tap.side == "pattern" for _, tap in places.values()):
            stack.enter_context(eager_attention(model))
        for hook_point, (module, tap) in places.items():
            stack.callback(attach(module, tap, partial(capture._record, hook_point)).remove)
        yield capture
