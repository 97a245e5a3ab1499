"""Why something is not fused, or stays as it is: a `Reason`, one of the causes of this catalogue with its parts.

Users read the sentences in reports, and the advice below them; `docs/refusals.md` is made from both (`make refusals`). What
the code asks of a reason it asks its cause, so that a sentence may be worded anew.

A cause is a constant here, named for its `name`: `SOFTMAX_OVER_ONE_KEY` for 'softmax-over-one-key'. Parts are words of the
graph (an op, a dtype, a shape), or other reasons.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cause:
    """One kind of reason.

    sentence           with the names of parts in braces; it ends without a full stop, since others may quote it
    advice             what the user can do about it, or that there is nothing to do
    says_only_unread   it says no more than that an op has no rule, so that any other reason is better
    """

    name: str
    sentence: str = field(repr=False)
    advice: str = field(repr=False)
    group: str = field(repr=False)
    says_only_unread: bool = field(default=False, repr=False)

    def __call__(self, **parts: object) -> Reason:
        """The reason of this cause with these parts."""
        kept = ((name, part if _quotes(part) else str(part)) for name, part in parts.items())
        return Reason(self, tuple(kept))


@dataclass(frozen=True)
class Reason:
    """A cause and its parts. `str` gives the sentence."""

    cause: Cause
    parts: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        said = {name: "; ".join(map(str, part)) if isinstance(part, tuple) else part for name, part in self.parts}
        return self.cause.sentence.format(**said)

    @property
    def root(self) -> Reason:
        """The reason that this one gives on in other words, if it does, else this one."""
        return next((part.root for _, part in self.parts if isinstance(part, Reason)), self)

    @property
    def limits(self) -> tuple[Cause, ...]:
        """The causes of the several reasons that this one sums up, such as the limits of kernels."""
        found: list[Cause] = []
        for _, part in self.parts:
            for each in part if isinstance(part, tuple) else ():
                found += each.limits or (each.cause,)
        return tuple(dict.fromkeys(found))


class ReasonError(Exception):
    """An exception whose message is its reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _quotes(part: object) -> bool:
    return isinstance(part, Reason) or (isinstance(part, tuple) and all(isinstance(x, Reason) for x in part))


SCORES = "From q and k to the softmax"
WEIGHTS = "From the softmax to the result"
SITES = "The attention as a whole"
UNSEEN = "Attentions that are not looked into"
WRITING = "The kernel's call in the graph"
KERNELS = "Limits of kernels"
NESTED = "Nested tensors"
GRAPHS = "Whole graphs"
MASKS = "Notes: masks and biases that stay tensors"
PADDING = "Notes: padding that stays"
GATHERS = "Notes: gathers that stay"
SHARDED = "Sequence parallelism"
TILING = "Notes: all-reduces that stay whole"

#: The groups in the order of docs/refusals.md, with what is said of each.
GROUPS: Mapping[str, str] = types.MappingProxyType(
    {
        SCORES: "What lies before the softmax cannot be read.",
        WEIGHTS: "What lies behind the softmax cannot be read.",
        SITES: "All ops can be read, and one fused op would not give the same.",
        UNSEEN: "They are found, and reported, in code that attnfuse does not rewrite.",
        WRITING: "The attention was read, and its call cannot be put where its result is made.",
        KERNELS: "The attention was read, and no kernel can run it, or not the one that the option `kernel` names. "
        "`limits` of a site has those of all kernels that were asked.",
        NESTED: "Of `scaled_dot_product_attention` on jagged nested tensors; see [nested.md](nested.md).",
        GRAPHS: "They concern all attentions of a graph, or the whole call.",
        MASKS: "The attention is fused all the same, with a mask or bias that is read from memory. The notes of a site say "
        "'a mask stays a tensor: ...', with one of these.",
        PADDING: "Attentions are fused all the same, on padded rows. The notes of a site say 'padding stays: ...', with one of "
        "these; see [padding.md](padding.md).",
        SHARDED: "Under the option `sequence_parallel`. What is left whole is computed on every rank, as without the option; see "
        "[distributed.md](distributed.md).",
        GATHERS: "Attentions are fused all the same, on keys and values that the graph gathers from a cache. The notes of a site "
        "say 'a gather stays: ...', with one of these; see [paged.md](paged.md).",
        TILING: "Under the option `tile_all_reduce`; the warnings of a report say '1 left: ...', with one of these. See "
        "[distributed.md](distributed.md).",
    }
)

# advice that several causes share
_NONE_DOES = "Nothing to do: eager computes something that no fused attention does."
_FAULT = "A fault of attnfuse, which leaves the attention as it was. Please report it with the line of the model."
_USE_DYNAMIC_FALSE = "Compile with dynamic=False, or use sizes that are constants."
_OUT_OF_PLACE = "Use the op that is not in place, such as masked_fill for masked_fill_, or write to a copy."
_FOR_THE_MASK = "Nothing to do, unless the mask can be computed in another way."

# -- from q and k to the softmax

PRODUCT_FACTOR = Cause(
    "product-factor",
    "alpha or beta of {op} is not a constant",
    "Multiply q, or the term that is added, by the factor before the product.",
    SCORES,
)
PRODUCT_WITHOUT_TENSOR = Cause(
    "product-without-tensor", "a factor of {op} is not a tensor", "Give both factors as tensors.", SCORES
)
PRODUCT_WITH_VECTOR = Cause(
    "product-with-vector", "a factor of the product is a vector", "Make it a matrix of one row with unsqueeze.", SCORES
)
EINSUM_OF_SEVERAL = Cause(
    "einsum-of-several", "einsum takes {count} tensors, not two", "Split it into products of two tensors.", SCORES
)
EINSUM_WITHOUT_OUTPUT = Cause(
    "einsum-without-output", "einsum {equation} names no output", "Name it, as in 'bhqd,bhkd->bhqk'.", SCORES
)
EINSUM_DIAGONAL = Cause(
    "einsum-diagonal",
    "einsum {equation} takes a diagonal",
    "Take the diagonal of the factor before the product, with torch.diagonal.",
    SCORES,
)
EINSUM_SUMS_ONE = Cause(
    "einsum-sums-one",
    "einsum {equation} sums over a dim of one tensor alone",
    "Sum over that dim before the product.",
    SCORES,
)
PRODUCT_OF_UNEQUAL_DIMS = Cause(
    "product-of-unequal-dims",
    "the product sums over two dims that may differ in size",
    "Expand a dim of size 1 before the product; for sizes that only eager knows, compile with dynamic=False.",
    SCORES,
)
SOFTMAX_OVER_ONE_KEY = Cause(
    "softmax-over-one-key",
    "the softmax runs over a single key",
    "Nothing to do: a single key has the weight 1, whatever its score is.",
    SCORES,
)
SOFTMAX_OVER_SEVERAL_DIMS = Cause(
    "softmax-over-several-dims",
    "the softmax runs over something other than one dim of the product",
    "Take the softmax over the dim of the keys alone.",
    SCORES,
)
SOFTMAX_OVER_BATCH = Cause(
    "softmax-over-batch",
    "the softmax runs over a batch dim of the product, not over the keys",
    "If the keys are meant, take the softmax over the last dim of q @ k.mT; else there is nothing to do.",
    SCORES,
)
MAXIMUM_BESIDE_SUM = Cause(
    "maximum-beside-sum",
    "the maximum of a row is subtracted from scores whose softmax is unshifted or has a sink",
    "Leave the subtraction out, and call torch.softmax, which subtracts the maximum itself.",
    SCORES,
)
SCORES_DEPEND_ON_MAXIMUM = Cause(
    "scores-depend-on-maximum",
    "an op on the scores depends on the maximum that was subtracted before it",
    "Leave the subtraction out if it is meant against overflow alone: torch.softmax subtracts the maximum itself.",
    SCORES,
)
SINK_NOT_FLOATING = Cause(
    "sink-not-floating", "the sink is not a floating-point tensor", "Convert the sink with float().", SCORES
)
SINK_IN_FLOAT16 = Cause(
    "sink-in-float16",
    "the softmax is in float16, to which the sink is rounded",
    "Compute the softmax in float32, or keep the sink in float16.",
    SCORES,
)
SCORE_PATH_TOO_LONG = Cause(
    "score-path-too-long",
    "the path from the product to the softmax is too long",
    "Do less between q @ k.mT and the softmax: some hundreds of ops are looked at.",
    SCORES,
)
SCORES_WRITTEN_BY_VIEW = Cause(
    "scores-written-by-view",
    "the scores are written in place through a view, which is used elsewhere",
    _OUT_OF_PLACE,
    SCORES,
)
SCORES_NOT_VIEWABLE = Cause(
    "scores-not-viewable",
    "the scores pass through code that cannot be viewed (autograd.Function, hook or functorch)",
    "Take that code out from between q @ k.mT and the softmax.",
    SCORES,
)
UNREAD_ON_SCORES = Cause(
    "unread-on-scores",
    "{op} on the scores is not read",
    "No kernel has this op before the softmax. Factors, added terms, masks, casts, clamp and tanh are read.",
    SCORES,
    says_only_unread=True,
)
SCORES_EXPANDED = Cause(
    "scores-expanded", "the scores are expanded after the product", "Expand q or k before it.", SCORES
)
VIEW_SPLITS_KEYS = Cause(
    "view-splits-keys",
    "a view splits the dim of the keys",
    "Let the keys of a row be one dim from the product to the softmax.",
    SCORES,
)
PRODUCT_SUMS_SEVERAL = Cause(
    "product-sums-several",
    "the product of q and k sums over {count} dims, not one",
    "Flatten the dims that are summed over into one head dim.",
    SCORES,
)
PRODUCT_WITH_OTHER_DIM = Cause(
    "product-with-other-dim",
    "the product has a dim of neither q nor k",
    "Write the product as q @ k.mT, and expand its factors before it.",
    SCORES,
)
HEADS_MIXED = Cause(
    "heads-mixed",
    "the scores of several heads are mixed before the softmax",
    "Nothing to do: a fused attention has the scores of one head at a time.",
    SCORES,
)
TERM_FACTOR = Cause(
    "term-factor",
    "a term is added to the scores with a factor that is not a constant",
    "Multiply the term yourself: scores + factor * term.",
    SCORES,
)
SCORES_NOT_FLOATING = Cause(
    "scores-not-floating", "the scores are cast to a dtype that is not floating", _NONE_DOES, SCORES
)
SCORES_MOVED = Cause(
    "scores-moved",
    "the scores move to another device",
    "Compute the scores, the softmax and the product with v on one device.",
    SCORES,
)
FILL_NOT_CONSTANT = Cause(
    "fill-not-constant",
    "a mask fills in a value that is not a constant",
    "Fill with a number, such as float('-inf').",
    SCORES,
)
WHERE_OF_TENSORS = Cause(
    "where-of-tensors",
    "where chooses between two tensors",
    "Fill with a number, as in where(keep, scores, float('-inf')), or add a bias to the scores.",
    SCORES,
)
WHERE_WITHOUT_VALUES = Cause(
    "where-without-values", "where is called without values to choose from", "Give both values.", SCORES
)
FILL_BROADCASTS = Cause(
    "fill-broadcasts",
    "a mask broadcasts the scores to a larger shape",
    "Expand q or k to the dims of the mask before the product.",
    SCORES,
)
DIVIDED_WITH_ROUNDING = Cause(
    "divided-with-rounding",
    "the scores are divided with rounding",
    "Leave out rounding_mode, unless the rounding is meant.",
    SCORES,
)
CLAMP_NOT_CONSTANT = Cause(
    "clamp-not-constant", "the scores are clamped to something that is not a constant", "Clamp to numbers.", SCORES
)
CLAMP_OUT_OF_ORDER = Cause(
    "clamp-out-of-order",
    "the scores are clamped between bounds that are not in order",
    "Let min be at most max: else every score is max.",
    SCORES,
)
DENOMINATOR_TERM = Cause(
    "denominator-term",
    "cannot read the term added to the softmax denominator",
    "Add a sink as exp(sink - m), where m is the maximum that was subtracted from the scores, to a sum with keepdim=True; or "
    "concatenate it to the scores, and cut its weight off after the softmax.",
    SCORES,
)
DENOMINATOR_UNREAD = Cause(
    "denominator-unread",
    "cannot read the softmax denominator that divides the exponentials of the scores",
    "Divide by their sum over the keys with keepdim=True, in their dtype, or call torch.softmax.",
    SCORES,
)

# -- from the softmax to the result

WEIGHT_PATH_TOO_LONG = Cause(
    "weight-path-too-long",
    "the path from the softmax to v is too long",
    "Do less between the softmax and the product with v: 40 ops are looked at.",
    WEIGHTS,
)
WEIGHTS_WITHOUT_V = Cause(
    "weights-without-v",
    "the weights are not multiplied by a value",
    "Nothing to do: without a product with v it is no attention.",
    WEIGHTS,
)
WEIGHTS_USED_TWICE = Cause(
    "weights-used-twice",
    "the weights are used more than once ({users})",
    "Do not return or reuse the weights, which a fused kernel does not hold: output_attentions=False, need_weights=False.",
    WEIGHTS,
)
WEIGHTS_NOT_VIEWABLE = Cause(
    "weights-not-viewable",
    "the weights pass through code that cannot be viewed (autograd.Function, hook or functorch)",
    "Take that code out from between the softmax and the product with v.",
    WEIGHTS,
)
VIEW_SPLITS_WEIGHTS = Cause(
    "view-splits-weights",
    "a view of the weights splits the keys or queries",
    "Let the queries and the keys be one dim each until the product with v.",
    WEIGHTS,
)
WEIGHTS_CAST = Cause(
    "weights-cast",
    "the weights are cast to a dtype that is not floating, or move to another device",
    "Cast them to a floating dtype, on the device of v.",
    WEIGHTS,
)
MASKED_AFTER_DROPOUT = Cause(
    "masked-after-dropout",
    "the weights are masked or scaled after dropout",
    "Mask and scale them before dropout.",
    WEIGHTS,
)
NAN_TO_NUM_VALUE = Cause(
    "nan-to-num-value",
    "nan_to_num puts another value than 0 into the weights, or comes after a mask or factor on them",
    "Call nan_to_num() right after the softmax.",
    WEIGHTS,
)
NAN_TO_NUM_GRADIENT = Cause(
    "nan-to-num-gradient",
    "nan_to_num on the weights has a gradient of NaN in eager, and of 0 in kernels",
    "Leave the option nan_policy at 'skip', which takes this difference.",
    WEIGHTS,
)
UNREAD_ON_WEIGHTS = Cause(
    "unread-on-weights",
    "{op} on the weights is not read",
    "No kernel has this op after the softmax. Casts, dropout, factors, masks with 0 and nan_to_num are read.",
    WEIGHTS,
    says_only_unread=True,
)
DROPOUT_TWICE = Cause(
    "dropout-twice", "dropout is applied twice", "Apply it once, with the joint probability.", WEIGHTS
)
WEIGHTS_FILLED = Cause(
    "weights-filled",
    "the weights are filled with something other than 0, or broadcast by their mask",
    "Fill them with 0, by a mask that broadcasts to their shape.",
    WEIGHTS,
)
WEIGHTS_FACTOR = Cause(
    "weights-factor",
    "the weights are divided by a tensor, or multiplied by themselves or by a symbolic number",
    "Multiply by the reciprocal of the tensor, or divide the result after the product with v.",
    WEIGHTS,
)
FACTOR_BROADCASTS = Cause(
    "factor-broadcasts",
    "a factor broadcasts the weights to a larger shape",
    "Expand q or k to the dims of the factor before the product.",
    WEIGHTS,
)
FACTOR_NOT_FLOATING = Cause(
    "factor-not-floating",
    "the weights are multiplied by a tensor that is not floating",
    "Write a mask as masked_fill(~mask, 0.0), or convert the factor with float().",
    WEIGHTS,
)
RESULT_ADDED_TO = Cause(
    "result-added-to",
    "the product with v is scaled, or added to something, in one call",
    "Multiply with matmul, and scale and add after it.",
    WEIGHTS,
)
WEIGHTS_SQUARED = Cause("weights-squared", "the weights are multiplied with themselves", _NONE_DOES, WEIGHTS)
NOT_SUMMED_OVER_KEYS = Cause(
    "not-summed-over-keys",
    "the weights are not summed over the keys",
    "Let the softmax, and the product with v, run over the same dim; if they are not meant to, there is nothing to do.",
    WEIGHTS,
)
V_BROADCAST = Cause("v-broadcast", "v is broadcast over the keys", "Expand v to the number of keys.", WEIGHTS)
V_DIMS = Cause(
    "v-dims",
    "v has {count} dims of its own, not one for the features",
    "Flatten the features of v into one dim.",
    WEIGHTS,
)
V_BATCH = Cause(
    "v-batch",
    "v has a batch dim that the scores do not have",
    "Expand q to the batch dims of v, or apply the weights to v with these dims among its features.",
    WEIGHTS,
)
DENOMINATOR_LATE_CHANGED = Cause(
    "denominator-late-changed",
    "the exponentials of the scores are changed between the softmax denominator and v",
    "Divide by the softmax denominator first, and mask, scale or drop out the weights then.",
    WEIGHTS,
)
DENOMINATOR_LATE_USED = Cause(
    "denominator-late-used",
    "the result is used elsewhere before the softmax denominator divides it",
    "Let nothing but the division use it.",
    WEIGHTS,
)
DENOMINATOR_LATE_UNREAD = Cause(
    "denominator-late-unread",
    "the product of the exponentials and v is not divided by the softmax denominator",
    "Divide it by the sum of the exponentials over the keys right after the product.",
    WEIGHTS,
)
DENOMINATOR_LATE_DIMS = Cause(
    "denominator-late-dims",
    "the result is divided by a sum over other dims",
    "Sum the exponentials over the keys, with keepdim=True.",
    WEIGHTS,
)
DENOMINATOR_LATE_DTYPE = Cause(
    "denominator-late-dtype",
    "the softmax denominator is summed in another dtype",
    "Sum in the dtype of the exponentials.",
    WEIGHTS,
)

# -- the attention as a whole

VIEW_SPLITS_ATTENTION = Cause(
    "view-splits-attention",
    "a view splits the queries, keys or features of the attention",
    "Let each of them be one dim from the first product to the second.",
    SITES,
)
ROWS_DIFFER = Cause("rows-differ", "the {what} differ from {other} to {other}", _NONE_DOES, SITES)
OPERAND_DIMS = Cause(
    "operand-dims",
    "an operand has a dim that the scores do not have, or one of theirs twice",
    "Let every mask and bias broadcast to the scores [*batch, Q, K], and q, k and v have their batch dims.",
    SITES,
)
RESULT_DIMS = Cause(
    "result-dims",
    "the result lacks a dim of the attention, or repeats one",
    "Do what sums over or repeats a dim after the product with v.",
    SITES,
)
SDPA_NOT_DENSE = Cause(
    "sdpa-not-dense",
    "query, key or value is not a dense tensor",
    "Use dense tensors, or jagged nested ones (layout=torch.jagged).",
    SITES,
)
SDPA_RANK = Cause("sdpa-rank", "the query has fewer than two dims", "Give the query as [*batch, Q, D].", SITES)
SDPA_BATCH = Cause(
    "sdpa-batch",
    "the batch dims of q, k and v do not line up",
    "Expand k and v to the batch dims and heads of q, or pass enable_gqa=True for grouped heads.",
    SITES,
)
SDPA_KEYS = Cause("sdpa-keys", "k and v have different numbers of keys", "Give a value for every key.", SITES)
SDPA_MASK = Cause(
    "sdpa-mask",
    "the mask has dims that q and k do not have",
    "Give a mask that broadcasts to [*batch, Q, K], or expand q to its batch dims.",
    SITES,
)
USED_ELSEWHERE = Cause(
    "used-elsewhere",
    "the {what} are used elsewhere ({user})",
    "Do not return or reuse scores or weights, which a fused kernel does not hold: output_attentions=False, need_weights=False.",
    SITES,
)
PARTLY_NO_GRAD = Cause(
    "partly-no-grad",
    "part of the attention is computed without gradients",
    "Put all of it under torch.no_grad, or nothing of it; detach q, k or v before it.",
    SITES,
)
RESULT_WRITTEN = Cause(
    "result-written", "the result is written into an existing tensor", "Leave out `out=`, and copy the result.", SITES
)
SCORES_WRITTEN = Cause(
    "scores-written", "the scores or weights are written in place before they are used", _OUT_OF_PLACE, SITES
)
OPERAND_WRITTEN = Cause(
    "operand-written",
    "a tensor that the attention reads is written in place before the attention is done",
    _OUT_OF_PLACE,
    SITES,
)
SINK_BY_OWN_MAXIMUM = Cause(
    "sink-by-own-maximum",
    "a sink relative to the maximum of the scores alone is NaN in fully masked rows",
    "Subtract the maximum of the scores and the sink: torch.maximum(scores.amax(-1, keepdim=True), sink).",
    SITES,
)
MASK_IN_FLOAT64 = Cause(
    "mask-in-float64",
    "a mask is added in float64, which keeps scores that a kernel's float32 loses beside it",
    "Make the mask in the dtype of the scores, or fill with float('-inf').",
    SITES,
)
LOG_SUM_EXP_OF_MASKED_ROWS = Cause(
    "log-sum-exp-of-masked-rows",
    "exp(s - logsumexp(s)) is no softmax in rows that are fully masked with finite numbers, as there may be here",
    "Call torch.softmax, or fill with float('-inf').",
    SITES,
)

# -- attentions that are not looked into

CALLED_BY_OWN_NAME = Cause(
    "called-by-own-name",
    "one of PyTorch's fused attentions is called by its own name",
    "Call scaled_dot_product_attention, which is read.",
    UNSEEN,
)
FLEX_ATTENTION = Cause(
    "flex-attention",
    "flex_attention is left to Inductor",
    "Call scaled_dot_product_attention, or write matmul, softmax and matmul, which are read.",
    UNSEEN,
)
IN_FORWARD_MODE = Cause(
    "in-forward-mode",
    "the attention lies inside of forward-mode differentiation (torch.func.jvp or jacfwd, torch.autograd.forward_ad)",
    "Nothing to do: kernels have no forward-mode derivative.",
    UNSEEN,
)
IN_VMAP = Cause(
    "in-vmap",
    "the attention lies inside of torch.vmap",
    "Call it on tensors that have the mapped dim as a batch dim.",
    UNSEEN,
)
IN_FUNC_GRAD = Cause(
    "in-func-grad",
    "the attention lies inside of torch.func.grad, vjp or the like",
    "Differentiate by torch.autograd, outside of what is compiled.",
    UNSEEN,
)
IN_FUNCTIONALIZE = Cause(
    "in-functionalize", "the attention lies inside of torch.func.functionalize", "Leave out functionalize.", UNSEEN
)
IN_AUTOGRAD_FUNCTION = Cause(
    "in-autograd-function",
    "the attention lies inside of a torch.autograd.Function, whose backward is its own",
    "Write it as plain ops.",
    UNSEEN,
)
IN_REGION = Cause(
    "in-region",
    "the attention lies inside of a region that is not looked into (torch.ops.higher_order.{op})",
    "Call it outside of the region.",
    UNSEEN,
)
OF_UNKNOWN_VALUES = Cause(
    "of-unknown-values",
    "the attention is made of values that are not known here (an opaque call, or code that a trace cannot follow)",
    "Compute q, k, v and the masks by plain ops on plain tensors.",
    UNSEEN,
)
ON_NESTED_BY_OPS = Cause(
    "on-nested-by-ops",
    "the attention is computed on nested tensors by ops that are not looked into",
    "Call scaled_dot_product_attention on the nested tensors.",
    UNSEEN,
)
ON_TENSOR_CLASS = Cause(
    "on-tensor-class",
    "the attention is computed on tensors of class {kind}",
    "On plain tensors it would be read.",
    UNSEEN,
)

# -- the kernel's call in the graph

TRAINED_BRANCH = Cause(
    "trained-branch",
    "the attention is trained in a branch of torch.cond, where PyTorch wants the gradients of both branches to lie in memory "
    "alike",
    "Without gradients it is fused. Else compute both branches, and choose with torch.where.",
    WRITING,
)
KEPT_TENSOR_WRITTEN = Cause(
    "kept-tensor-written",
    "a tensor that the attention keeps for backward is written to after it",
    _OUT_OF_PLACE,
    WRITING,
)
CALL_NOT_TAKEN_APART = Cause(
    "call-not-taken-apart",
    "the attention lies inside a call whose results cannot be taken apart",
    "Take the results of the call one by one, by unpacking or indexing them.",
    WRITING,
)
LOG_SUM_EXP_IN_CALL = Cause(
    "log-sum-exp-in-call",
    "the log-sum-exp of the scores is made inside of another call",
    "Call logsumexp beside the attention, not inside of a region or function of its own.",
    WRITING,
)
LOG_SUM_EXP_USED_EARLY = Cause(
    "log-sum-exp-used-early",
    "the log-sum-exp of the scores is used before the attention is done",
    "Use it after the product with v.",
    WRITING,
)
CALLS_DIFFER = Cause(
    "calls-differ",
    "the attention lies in a region that is called more than once, and its calls differ",
    "Leave out nested_compile_region, or call the region with the same kinds of arguments.",
    WRITING,
)
CALLS_READ_OUTSIDE = Cause(
    "calls-read-outside",
    "the attention lies in a region that is called more than once, and depends on values from outside of it that are not its "
    "arguments",
    "Make these values arguments of the region, or leave out nested_compile_region.",
    WRITING,
)
CALLS_OF_OTHERS = Cause(
    "calls-of-others",
    "the attention lies in a region that is called more than once, and is another one in another call",
    "Leave out nested_compile_region, or let shapes, dtypes and masks of all calls be alike.",
    WRITING,
)
MADE_OUTSIDE = Cause(
    "made-outside",
    "a value that the attention needs is made outside of its region, which is called more than once",
    "Make the value an argument of the region, or leave out nested_compile_region.",
    WRITING,
)
NOT_AVAILABLE = Cause(
    "not-available",
    "a value that the attention needs is not available where its result is made",
    "Compute masks and sizes by plain ops in the code around the attention.",
    WRITING,
)
NOT_REPEATABLE = Cause(
    "not-repeatable",
    "a value that the attention needs comes from code that cannot be repeated ({op})",
    "Compute q, k, v and masks outside of the region or function that the attention lies in, and pass them to it.",
    WRITING,
)
MADE_FROM_WRITTEN = Cause(
    "made-from-written",
    "a value that the attention needs was made from memory that is written before the result",
    _OUT_OF_PLACE,
    WRITING,
)
TOO_DEEP = Cause(
    "too-deep", "the attention is too deep inside one call", "Split the function or region that it lies in.", WRITING
)
NO_SUCH_SIZE = Cause("no-such-size", "no tensor of the graph has the size {size}", _USE_DYNAMIC_FALSE, WRITING)
OP_REFUSES = Cause("op-refuses", "the op does not take it ({error})", _FAULT, WRITING)
NOT_A_TENSOR = Cause("not-a-tensor", "{what} is not a tensor", _FAULT, WRITING)
NOT_AS_STATED = Cause("not-as-stated", "{what} is {found} where it was to be {wanted}", _FAULT, WRITING)
MASK_DTYPE_DIFFERS = Cause(
    "mask-dtype-differs", "{op} gives {found} for elements of a mask, and {wanted} in the graph", _FAULT, WRITING
)
VALUE_UNKNOWN = Cause("value-unknown", "nothing is known of the value of {node}", _FAULT, WRITING)
PADDED_KEYS_IN_CALL = Cause(
    "padded-keys-in-call",
    "an attention of padded keys lies inside of another call",
    "Call the attention outside of regions and functions of their own.",
    WRITING,
)
PADDED_NEEDED = Cause("padded-needed", "a padded tensor is needed where it is not packed", _FAULT, WRITING)

# -- limits of kernels

NO_KERNEL = Cause(
    "no-kernel", "no kernel can run it: {kernels}", "See the limits of the kernel for your device.", KERNELS
)
KERNEL_CANNOT = Cause(
    "kernel-cannot",
    "kernel {kernel} cannot: {limits}",
    "Leave out the option kernel, so that the first kernel that can is taken, or see the limits.",
    KERNELS,
)
KERNEL_DTYPE = Cause(
    "kernel-dtype",
    "{what} in {dtype} (takes {taken})",
    "Compute the attention in one of the dtypes that the kernel takes.",
    KERNELS,
)
KERNEL_OPERAND_DTYPE = Cause(
    "kernel-operand-dtype",
    "operand {index} in {dtype} (takes {taken})",
    "Convert the mask or bias to a dtype that the kernel takes.",
    KERNELS,
)
KERNEL_OPERANDS = Cause(
    "kernel-operands",
    "{count} masks, biases and other tensors (takes {taken})",
    "Add up the biases, or combine the masks, before the attention.",
    KERNELS,
)
KERNEL_STEP = Cause(
    "kernel-step",
    "{what} {kind} (takes {taken})",
    "Leave out the option kernel: cpu and triton take all steps.",
    KERNELS,
)
KERNEL_DROPOUT = Cause(
    "kernel-dropout",
    "dropout",
    "Leave out the option kernel: cpu and triton have dropout. Or call model.eval().",
    KERNELS,
)
KERNEL_DROPOUT_NUMBERS = Cause(
    "kernel-dropout-numbers",
    "dropout in a part of an attention, whose queries and keys have numbers of their own",
    "Leave out the option kernel: cpu and triton take the numbers. Or call model.eval().",
    KERNELS,
)
KERNEL_BATCH_DIMS = Cause(
    "kernel-batch-dims", "{count} batch dims (takes {taken})", "Flatten batch dims before the attention.", KERNELS
)
KERNEL_HEAD_SIZE = Cause(
    "kernel-head-size",
    "head size {dim} {size} (takes {taken})",
    "Use smaller heads; for a size that is unknown, compile with dynamic=False.",
    KERNELS,
)
KERNEL_LAYOUT = Cause(
    "kernel-layout",
    "layout {layout} (takes {taken})",
    "Leave out the option kernel: cpu and triton take packed rows and paged caches.",
    KERNELS,
)
KERNEL_DEVICE = Cause(
    "kernel-device", "device {device} (runs on {taken})", "Move the model to a device that a kernel runs on.", KERNELS
)
KERNEL_CHIP = Cause("kernel-chip", "chip {chip} (runs on {taken})", "Nothing to do on this machine.", KERNELS)
KERNEL_COMPUTE_CAPABILITY = Cause(
    "kernel-compute-capability",
    "compute capability {found} (takes {taken})",
    "Nothing to do on this GPU, where Inductor's kernels are used.",
    KERNELS,
)
KERNEL_OTHER_VENDOR = Cause(
    "kernel-other-vendor", "a device of type {device} that is not NVIDIA's", "Nothing to do on this device.", KERNELS
)
KERNEL_FILLED_WEIGHTS = Cause(
    "kernel-filled-weights", "weights filled with a number other than 0", "Fill masked weights with 0.", KERNELS
)
KERNEL_SINK_AND_FILLED_WEIGHTS = Cause(
    "kernel-sink-and-filled-weights",
    "a sink with weights filled with a number other than 0",
    "Fill masked weights with 0.",
    KERNELS,
)
KERNEL_SINK = Cause("kernel-sink", "a sink", "Leave out the option kernel: cpu and triton have sinks.", KERNELS)
KERNEL_UNSHIFTED = Cause(
    "kernel-unshifted", "an unshifted softmax", "Call torch.softmax, which subtracts the maximum.", KERNELS
)
KERNEL_LOG_SUM_EXP = Cause(
    "kernel-log-sum-exp",
    "the log-sum-exp as a result",
    "Leave out the option kernel: cpu and triton give the log-sum-exp.",
    KERNELS,
)
KERNEL_SEVERAL_DTYPES = Cause(
    "kernel-several-dtypes",
    "inputs and result of several dtypes",
    "Convert q, k and v to one dtype before the attention, or leave out the option kernel.",
    KERNELS,
)
KERNEL_NOT_PLAIN = Cause(
    "kernel-not-plain",
    "more than a scale and a causal mask of -inf",
    "Leave out the option kernel: cpu and triton take masks, biases and the rest.",
    KERNELS,
)
KERNEL_NOT_BANDED = Cause(
    "kernel-not-banded",
    "more than a scale, a softcap, and keys that are hidden by their distance",
    "Leave out the option kernel: cpu and triton take masks, biases and the rest.",
    KERNELS,
)
KERNEL_SOFTCAP = Cause(
    "kernel-softcap", "a softcap", "Leave out the option kernel: cpu and triton have softcaps.", KERNELS
)
KERNEL_BAND = Cause(
    "kernel-band",
    "a band of keys with an edge beyond the diagonal of the last query and key",
    "Leave out the option kernel: cpu and triton take any band.",
    KERNELS,
)
KERNEL_BAND_LENGTHS = Cause(
    "kernel-band-lengths",
    "a mask by position, with numbers of queries and keys that are not known",
    "Leave out the option kernel, or compile with dynamic=False.",
    KERNELS,
)
KERNEL_ROW_WITHOUT_KEYS = Cause(
    "kernel-row-without-keys",
    "rows that see no key, which give something else than 0",
    "Leave out the option kernel, or let such rows see a key.",
    KERNELS,
)
KERNEL_HEADS_HERE = Cause(
    "kernel-heads-here",
    "head sizes {first} and {second}, with this softcap, sink and groups, on {device}",
    "Leave out the option kernel: cpu and triton take other head sizes.",
    KERNELS,
)
KERNEL_ONE_KEY = Cause("kernel-one-key", "a single key", "Leave out the option kernel.", KERNELS)
KERNEL_LARGE_BATCH = Cause(
    "kernel-large-batch", "a batch or heads of more than {most}", "Leave out the option kernel.", KERNELS
)
KERNEL_NOT_DETERMINISTIC = Cause(
    "kernel-not-deterministic",
    "torch.use_deterministic_algorithms, which it does not follow",
    "Leave out the option kernel: triton is deterministic.",
    KERNELS,
)
KERNEL_PACKAGE = Cause(
    "kernel-package",
    "package {package} is not installed",
    "Install it if you want the kernel compared; others run the attention without it.",
    KERNELS,
)
KERNEL_PACKAGE_UNFIT = Cause(
    "kernel-package-unfit",
    "package {package} {version} cannot be used: {error}",
    "Install another version; others run the attention without it.",
    KERNELS,
)
KERNEL_NOT_COMPARED = Cause(
    "kernel-not-compared",
    "kernel {kernel} was not compared: {limits}",
    "Nothing to do: the fastest of the other kernels was taken.",
    KERNELS,
)
KERNEL_SCALE = Cause(
    "kernel-scale",
    "scale {scale} (takes positive ones)",
    "Multiply q by the sign of the scale, or leave out the option kernel.",
    KERNELS,
)
KERNEL_CAUSAL_RECTANGLE = Cause(
    "kernel-causal-rectangle",
    "a causal mask without as many keys as queries",
    "Leave out the option kernel: cpu and triton take causal masks of any shape.",
    KERNELS,
)
KERNEL_NAN_POLICY = Cause(
    "kernel-nan-policy", "nan_policy 'eager'", "Leave out the option kernel, or leave nan_policy at 'skip'.", KERNELS
)
KERNEL_HEAD_SIZES = Cause(
    "kernel-head-sizes",
    "head sizes {first} and {second}",
    "Leave out the option kernel: cpu and triton take values of another head size.",
    KERNELS,
)
KERNEL_HEAD_MULTIPLE = Cause(
    "kernel-head-multiple",
    "head size {size} (takes multiples of 8)",
    "Leave out the option kernel, or use head sizes that 8 divides.",
    KERNELS,
)
KERNEL_TILES_BY_VALUE = Cause(
    "kernel-tiles-by-value",
    "a mask by the values of operands, such as documents",
    "Leave out the option kernel: cpu and triton look at such masks before they compute a tile.",
    KERNELS,
)
KERNEL_BATCH_ORDER = Cause(
    "kernel-batch-order",
    "batch dims that are not B, H or B, Hkv, group",
    "Leave out the option kernel, or expand q, k and v to [B, H, rows, D].",
    KERNELS,
)
KERNEL_GROUPS = Cause(
    "kernel-groups", "groups of query heads", "Leave out the option kernel, or repeat the key heads.", KERNELS
)
KERNEL_NOT_IN_TORCH = Cause(
    "kernel-not-in-torch",
    "this torch has no {kernel}",
    "Use a torch that has it, or leave out the option kernel.",
    KERNELS,
)
KERNEL_SWITCHED_OFF = Cause(
    "kernel-switched-off",
    "torch.backends.cuda has {kernel} attention switched off",
    "Switch it on (torch.backends.cuda.enable_flash_sdp and its like), or leave out the option kernel.",
    KERNELS,
)
KERNEL_WITHOUT_CUDNN = Cause(
    "kernel-without-cudnn", "cuDNN is not there", "Install a torch with cuDNN, or leave out the option kernel.", KERNELS
)
KERNEL_NO_GRADIENT = Cause(
    "kernel-no-gradient",
    "gradients",
    "Call it under torch.no_grad(), or train on another device.",
    KERNELS,
)
KERNEL_NOT_PARTIAL = Cause(
    "kernel-not-partial",
    "gradients of a part of the keys by the statistics of whole rows",
    'Compile with options={"kernel": "cpu"} or "triton", or without sequence parallelism.',
    KERNELS,
)
KERNEL_NAN_TO_ZERO = Cause(
    "kernel-nan-to-zero",
    "weights that are NaN turned into 0",
    "Leave out the option kernel, or mask with scaled_dot_product_attention, whose rows without keys are 0.",
    KERNELS,
)
KERNEL_FACTOR = Cause(
    "kernel-factor", "scores times a tensor", "Multiply q by it, or leave out the option kernel.", KERNELS
)
KERNEL_FILL = Cause(
    "kernel-fill",
    "a fill that leaves hidden keys some weight, or several numbers that hide keys",
    "Fill with -inf, or with one number of at most -1e9 (-1e30 where it is added).",
    KERNELS,
)
KERNEL_BIAS_DTYPE = Cause(
    "kernel-bias-dtype",
    "a bias that is not in {dtype}, the dtype of q",
    "Convert the bias to the dtype of q and k.",
    KERNELS,
)
KERNEL_NOT_AVAILABLE = Cause(
    "kernel-not-available",
    "it does not work here: {error}",
    "Install what is missing: g++ or clang++ (or set CXX) for cpu, Triton for triton. Where the cache directory is at fault, "
    "set ATTNFUSE_CACHE_DIR to one that only you can write to.",
    KERNELS,
)

KERNEL_NO_NVRTC = Cause(
    "kernel-no-nvrtc",
    "no NVRTC compiles for compute capability {capability}: {found}; pip install 'attnfuse[volta]' brings one",
    "Run that command. The wheels of torch for CUDA 12 bring one too; those for CUDA 13 bring one that does not know 7.0.",
    KERNELS,
)

# -- nested tensors

NESTED_STRIDED = Cause(
    "nested-strided", "a nested tensor is strided", "Make nested tensors with layout=torch.jagged.", NESTED
)
NESTED_NONE = Cause("nested-none", "no tensor is jagged", "Call it on jagged nested tensors.", NESTED)
NESTED_HALF = Cause(
    "nested-half", "one of key and value is jagged, the other dense", "Make both jagged, or both dense.", NESTED
)
NESTED_RANKS = Cause(
    "nested-ranks",
    "query, key and value have {query}, {key} and {value} dims",
    "Give all three as [B, heads, length, D].",
    NESTED,
)
NESTED_OTHER_DIM = Cause(
    "nested-other-dim",
    "a jagged dim is not the one of the sequence",
    "Transpose the tensors so that the jagged dim is the last but one.",
    NESTED,
)
NESTED_LENGTHS = Cause(
    "nested-lengths",
    "key and value have other lengths",
    "Make key and value with the same offsets: one from the other, or both from one tensor.",
    NESTED,
)
NESTED_DTYPES = Cause(
    "nested-dtypes",
    "query, key and value have other dtypes or devices",
    "Convert them to one dtype on one device.",
    NESTED,
)
NESTED_HEAD_SIZES = Cause(
    "nested-head-sizes", "query and key have head sizes {query} and {key}", "Give query and key one head size.", NESTED
)
NESTED_MASK = Cause("nested-mask", "attn_mask is nested", "Give one that is padded to the longest sequence.", NESTED)
NESTED_MASK_AND_CAUSAL = Cause(
    "nested-mask-and-causal", "attn_mask and is_causal are both given", "Put the causal mask into attn_mask.", NESTED
)
NESTED_MASK_KIND = Cause(
    "nested-mask-kind",
    "attn_mask has dtype {dtype} and {count} dims",
    "Give one that is bool or floating, with no more dims than the query.",
    NESTED,
)
NESTED_BATCHES = Cause(
    "nested-batches",
    "query, key and value have other numbers of sequences",
    "Give all three the same number, or a dense one 1.",
    NESTED,
)
NESTED_MASK_SHAPE = Cause(
    "nested-mask-shape",
    "attn_mask has the shape {shape} for {wanted} sequences and heads",
    "Give one that broadcasts to [B, heads, Q, K].",
    NESTED,
)
NESTED_VALUE_HEADS = Cause(
    "nested-value-heads", "key and value have other heads", "Give key and value the same heads.", NESTED
)
NESTED_HEADS = Cause(
    "nested-heads",
    "there are {query} query heads and {key} key heads",
    "Expand the key heads, or pass enable_gqa=True where they divide the query heads.",
    NESTED,
)

# -- whole graphs

FUEL = Cause("fuel", "fuel: {fuel} rewrites are done", "Raise the option fuel, or leave it out.", GRAPHS)
UNEXPECTED_ERROR = Cause("unexpected-error", "unexpected error ({error})", _FAULT, GRAPHS)
UNSUPPORTED_TORCH = Cause(
    "unsupported-torch",
    "torch {version} is not supported (attnfuse supports {supported})",
    "Install a torch that is supported.",
    GRAPHS,
)
NOT_VIEWED = Cause("not-viewed", "the graph could not be viewed: {why}", "See what it says after the colon.", GRAPHS)
NO_TENSOR_INPUT = Cause(
    "no-tensor-input",
    "the graph has no tensor input",
    "Give the tensors of the attention as inputs, parameters or buffers.",
    GRAPHS,
)
WRITES_BESIDE_NESTED = Cause(
    "writes-beside-nested",
    "something is written in place beside nested tensors, whose memory is not followed",
    _OUT_OF_PLACE,
    GRAPHS,
)
WRITE_IN_VMAP = Cause("write-in-vmap", "a write to a tensor inside of torch.vmap", _OUT_OF_PLACE, GRAPHS)
NO_OUTPUT = Cause("no-output", "the graph has no output", _FAULT, GRAPHS)
NOT_TRACED = Cause("not-traced", "a tensor is not part of the trace", _FAULT, GRAPHS)
NOT_SEARCHED = Cause(
    "not-searched", "what the view does not show was not searched for attentions: {error}", _FAULT, GRAPHS
)
GRAPH_LEFT = Cause("graph-left", "a graph is left as it was: {error}", _FAULT, GRAPHS)
PROGRAM_LEFT = Cause("program-left", "the program is left as it was: {error}", _FAULT, GRAPHS)
NOT_COMPILED = Cause(
    "not-compiled",
    "the rewritten graph did not compile ({error}); the original is used",
    "See what the inner compiler says; TORCH_LOGS='+attnfuse' logs more. It may be a fault of attnfuse.",
    GRAPHS,
)
NO_INDUCTOR = Cause(
    "no-inductor",
    "Inductor has no code for {devices}: the graph runs op by op",
    "Install what adds the device to Inductor (torch_npu's own, for an NPU), or set the option inner.",
    GRAPHS,
)
INDUCTOR_FAILED = Cause(
    "inductor-failed",
    "Inductor failed for {devices} ({error}): the graph runs op by op",
    "See what the device's part of Inductor says, or set the option inner to 'aot_eager'.",
    GRAPHS,
)
NO_GRAPH = Cause(
    "no-graph",
    "no graph was compiled: is torch.compile disabled, or did Dynamo skip the call?",
    "TORCH_LOGS=dynamo says what was skipped.",
    GRAPHS,
)
GRAPH_BREAK = Cause(
    "graph-break",
    "the softmax{at} looks like that of an attention whose products are in other graphs: without the graph break between them "
    "it would be read",
    "TORCH_LOGS=graph_breaks says where the break is.",
    GRAPHS,
)
STRIDED_REACH_NO_COMPILER = Cause(
    "strided-reach-no-compiler",
    "strided nested tensors reach no compiler",
    "Make nested tensors with layout=torch.jagged.",
    GRAPHS,
)
VERIFY_RANDOM = Cause(
    "verify-random",
    "verify compares nothing: the graph draws random numbers (dropout), and eager draws others",
    "Verify the model in eval mode, or with dropout of 0.",
    GRAPHS,
)
VERIFY_FAILED = Cause(
    "verify-failed",
    "verify compares nothing: {error}",
    "The graph as it was does not run eagerly, or its results cannot be compared.",
    GRAPHS,
)
VERIFY_DIFFERS = Cause(
    "verify-differs",
    "output {index} of a compiled graph differs from eager",
    "Find the attention with the option fuel, and please report it.",
    GRAPHS,
)

# -- notes: masks and biases that stay tensors

MASK_STAYS = Cause("mask-stays", "a mask stays a tensor: {why}", "See what it says after the colon.", MASKS)
BIAS_STAYS = Cause("bias-stays", "a bias stays a tensor: {why}", "See what it says after the colon.", MASKS)
MASK_FROM_OUTSIDE = Cause(
    "mask-from-outside",
    "it comes from outside of the graph",
    "Compute the mask inside of what is compiled, from positions, lengths or document ids.",
    MASKS,
)
MASK_OP = Cause(
    "mask-op",
    "{op} is not made of indices",
    "Compute the mask by comparisons and arithmetic of positions, lengths and ids.",
    MASKS,
)
MASK_MADE_BY = Cause(
    "mask-made-by",
    "{op} gives it",
    "Compute the mask by comparisons and arithmetic of positions, lengths and ids.",
    MASKS,
)
MASK_WRITTEN = Cause("mask-written", "its memory is written to", _OUT_OF_PLACE, MASKS)
MASK_TOO_LARGE = Cause("mask-too-large", "too many ops compute it", "Compute the mask by fewer ops.", MASKS)
MASK_TOO_MANY_PARTS = Cause(
    "mask-too-many-parts", "it has more than {most} parts", "Compute the mask by fewer ops.", MASKS
)
MASK_NOT_DENSE = Cause("mask-not-dense", "a tensor is not dense", "Use dense tensors for masks.", MASKS)
MASK_DTYPE = Cause(
    "mask-dtype", "expressions have no dtype {dtype}", "Use int64, int32, bool or a floating dtype.", MASKS
)
MASK_FLOATING = Cause(
    "mask-floating", "it compares floating-point numbers", "Compare integers: positions, lengths, ids.", MASKS
)
MASK_INDEX_PRODUCT = Cause("mask-index-product", "two indices are multiplied", _FOR_THE_MASK, MASKS)
MASK_DIVISION = Cause(
    "mask-division",
    "something other than a positive constant divides",
    "Divide by a constant, as in positions // block.",
    MASKS,
)
MASK_OVERFLOW = Cause("mask-overflow", "arithmetic may leave the range of {dtype}", "Compute the mask in int64.", MASKS)
MASK_NUMBER_RANGE = Cause(
    "mask-number-range", "a number does not fit into {dtype}", "Use a number that fits, or a wider dtype.", MASKS
)
MASK_NUMBER_DTYPE = Cause("mask-number-dtype", "{op} of numbers gives another dtype, or none", _FOR_THE_MASK, MASKS)
MASK_NOT_A_NUMBER = Cause("mask-not-a-number", "an argument is not a number", _FOR_THE_MASK, MASKS)
MASK_SYMBOLIC_NUMBER = Cause(
    "mask-symbolic-number", "a symbolic number is not a size", "Use sizes of tensors, or constants.", MASKS
)
MASK_SYMBOLIC = Cause("mask-symbolic", "the size or place of {what} is symbolic", _USE_DYNAMIC_FALSE, MASKS)
MASK_KEYWORD = Cause("mask-keyword", "a keyword argument is computed", "Pass a constant.", MASKS)
MASK_MAY_RAISE = Cause(
    "mask-may-raise",
    "{op} of integers may raise where the graph does not compute it",
    "Divide by a positive constant.",
    MASKS,
)
MASK_CLAMP_FRACTION = Cause("mask-clamp-fraction", "integers are clamped to a fraction", "Clamp to an integer.", MASKS)
MASK_CONVERTED_WRITE = Cause(
    "mask-converted-write", "a result is converted as it is written", "Use the op that is not in place.", MASKS
)
MASK_WITHOUT_DIMS = Cause(
    "mask-without-dims", "an op works along a dim of a tensor that has none", _FOR_THE_MASK, MASKS
)
MASK_INDEXED_BY_MASK = Cause(
    "mask-indexed-by-mask",
    "a tensor is indexed by something other than int64 or int32",
    "Use torch.where in place of indexing by a mask.",
    MASKS,
)
MASK_EMBEDDING = Cause(
    "mask-embedding",
    "an embedding has padding_idx, scale_grad_by_freq or sparse",
    "Index the table: table[ids].",
    MASKS,
)
MASK_ARANGE = Cause(
    "mask-arange",
    "arange begins at a fraction, or its step is not an integer constant",
    "Count in integers, and scale later.",
    MASKS,
)
MASK_FULL = Cause(
    "mask-full", "a tensor is filled with a number that is neither a constant nor an integer", _FOR_THE_MASK, MASKS
)
MASK_CAT = Cause(
    "mask-cat",
    "tensors are concatenated that are not made of indices",
    "Compute the mask by torch.where on positions in place of torch.cat.",
    MASKS,
)
MASK_CAT_DTYPES = Cause(
    "mask-cat-dtypes", "tensors of several dtypes are concatenated", "Convert them to one dtype first.", MASKS
)
MASK_DIFF = Cause(
    "mask-diff",
    "a difference is of higher order, or not of integers",
    "Take the first difference of an integer tensor.",
    MASKS,
)
MASK_RUNNING_SUM = Cause(
    "mask-running-sum",
    "a running sum is of something other than one integer constant",
    "Count with arange in place of cumsum, where it counts positions.",
    MASKS,
)
MASK_GRADIENT = Cause(
    "mask-gradient",
    "a gradient stops behind {node}",
    "Detach the bias last, after all that computes it, or not at all.",
    MASKS,
)
MASK_OPERAND_COMPUTED = Cause("mask-operand-computed", "the operand is computed for the op", _FOR_THE_MASK, MASKS)
MASK_OF_BATCH_NUMBER = Cause(
    "mask-of-batch-number",
    "it depends on the number of a batch element",
    "Put what differs between batch elements into a tensor [B], and index that.",
    MASKS,
)
MASK_INDEX_OF_BATCH = Cause("mask-index-of-batch", "an index differs between batch elements", _FOR_THE_MASK, MASKS)
MASK_DIAGONAL = Cause("mask-diagonal", "a diagonal of a tensor is read", _FOR_THE_MASK, MASKS)
MASK_INDEX_NOT_PLAIN = Cause("mask-index-not-plain", "an index is not a position plus a constant", _FOR_THE_MASK, MASKS)
MASK_INDEX_OUTSIDE = Cause(
    "mask-index-outside",
    "an index may be outside of its tensor",
    "Clamp the index to the size of the tensor, with constants.",
    MASKS,
)
MASK_SEVERAL_INDICES = Cause(
    "mask-several-indices",
    "a tensor is read at several computed indices",
    "Read a table of one dim, at one index.",
    MASKS,
)
MASK_TABLE_PER_PAIR = Cause(
    "mask-table-per-pair", "a table has a row for every query and key", "Nothing to do: the table is the mask.", MASKS
)
MASK_VALUE_PER_PAIR = Cause(
    "mask-value-per-pair",
    "a tensor has a value of its own for every query and key",
    "Nothing to do, unless it depends on the query, the key or their distance alone.",
    MASKS,
)
MASK_OTHER_INDEX = Cause(
    "mask-other-index", "a value depends on an index that the attention does not have", _FOR_THE_MASK, MASKS
)

# -- notes: gathers that stay

GATHER_STAYS = Cause("gather-stays", "a gather stays: {why}", "See what it says after the colon.", GATHERS)
GATHER_GRADIENT = Cause(
    "gather-gradient",
    "gradients are needed",
    "Call the model under torch.no_grad() or torch.inference_mode(): kernels read through a block table without gradients.",
    GATHERS,
)
GATHER_INDEX = Cause(
    "gather-index",
    "{op} takes something else than one tensor of integers",
    "Index the cache by one tensor of integers, the block table or the slots of all keys.",
    GATHERS,
)
GATHER_OF_ONE = Cause(
    "gather-of-one", "only one of k and v is gathered", "Gather both from caches, by one block table.", GATHERS
)
GATHER_USED = Cause(
    "gather-used",
    "what is gathered is used elsewhere too",
    "Nothing to do: it is made for what else uses it, and is read faster than through a block table.",
    GATHERS,
)
GATHER_TABLES = Cause(
    "gather-tables", "k and v are gathered by different block tables", "Use one block table for both.", GATHERS
)
GATHER_ORDER = Cause(
    "gather-order",
    "it does not say block by block where the keys are",
    "Flatten the blocks of a sequence, and the rows of a block, to the dim of the keys, in this order.",
    GATHERS,
)
GATHER_CAST = Cause(
    "gather-cast", "what is gathered is converted to {dtype}", "Keep the cache in the dtype of the model.", GATHERS
)
GATHER_WRITTEN = Cause(
    "gather-written",
    "the cache or the block table is written between the gather and the attention",
    "Write new keys and values to their caches before the first of them is gathered.",
    GATHERS,
)

# -- notes: padding that stays

SHARDED_NOT = Cause(
    "sharded-not", "the graph is left whole on every rank: {why}", "See what it says after the colon.", SHARDED
)
SHARDED_APART = Cause(
    "sharded-apart",
    "a graph is left whole on every rank, where {op} ({at}) draws from each rank's own generator",
    "Seed all ranks alike (`torch.manual_seed`), or they drift apart; the report says why the graph is whole.",
    SHARDED,
)
NOTHING_TO_SHARD = Cause(
    "nothing-to-shard",
    "no attention has queries that come, token by token, from an input or another tensor of whole sequences",
    "Nothing to do for a graph without self-attention; else look at the ops between the input and the attention.",
    SHARDED,
)
SHARDED_SPEC = Cause(
    "sharded-spec", "it is not computed over ranks: {why}", "See what it says after the colon.", SHARDED
)
SHARDED_NESTED = Cause(
    "sharded-nested", "the graph has nested tensors", "Pass padded or packed tensors with a mask.", SHARDED
)
SHARDED_WRITTEN = Cause(
    "sharded-written",
    "{op} of sharded tokens is written to in place",
    "Use the op that is not in place; for a cache that is written to, run the prompt without sequence_parallel's graph.",
    SHARDED,
)
SHARDED_RANDOM = Cause(
    "sharded-random",
    "{op} ({at}) draws random numbers that need not be equal on all ranks",
    "Draw them before the call, alike on all ranks, and pass them in. Dropout is drawn alike as it is.",
    SHARDED,
)
SHARDED_REGION = Cause(
    "sharded-region",
    "a region that may run more than once, or not at all, holds token dims",
    "Leave out nested_compile_region and torch.cond, or compile without sequence_parallel.",
    SHARDED,
)
SHARDED_LOG_SUM_EXP = Cause(
    "sharded-log-sum-exp", "the log-sum-exp of the scores is used", "Nothing to do: it is computed whole.", SHARDED
)
SHARDED_PAIRS = Cause(
    "sharded-pairs",
    "tokens stand against tokens",
    "Nothing to do: it is computed whole, from gathered tokens.",
    SHARDED,
)
SHARDED_ANEW = Cause("sharded-anew", "the tensor is cut into tokens here", "Nothing to do.", SHARDED)
SHARDED_NOT_TUNED = Cause(
    "sharded-not-tuned",
    "nothing is measured under sequence_parallel: ranks would choose differently",
    "Leave out the option tune, or tune on one device first: what it keeps is used.",
    SHARDED,
)
RESULTS_GATHERED = Cause(
    "results-gathered",
    "results are gathered on every rank, {results} a call, more than all else that is sent ({rest})",
    "Compile a function that returns the loss alone, or take SequenceParallel(mesh, outputs='own').",
    SHARDED,
)
SHARDED_KEPT = Cause("sharded-kept", "{op} of whole tensors is still needed by what is left", _FAULT, SHARDED)

PADDING_STAYS = Cause("padding-stays", "padding stays: {why}", "See what it says after the colon.", PADDING)
PADDING_FUEL = Cause("padding-fuel", "too little fuel", "Raise the option fuel, or leave it out.", PADDING)
PADDING_RETURNED = Cause(
    "padding-returned",
    "a result of the graph holds padding, so that its rows are computed",
    "Compile what needs no padding (pooled rows, a loss) with the model, or say options={'padding': 'drop'} where nobody reads "
    "results there: they are zeros then.",
    PADDING,
)
PADDING_READ = Cause(
    "padding-read",
    "{op} ({at}) may read padding",
    "Mask it before: what is 0, or low, in padding may be summed, or its greatest taken.",
    PADDING,
)
PADDING_GUARD = Cause(
    "padding-guard",
    "where tokens are, or what must hold of them, takes more than small tensors of the batch to tell",
    "Make the mask, and what selects tokens, of the inputs alone.",
    PADDING,
)
PADDING_HOST = Cause(
    "padding-host",
    "{what}, so that the host may not look at where tokens are before each call",
    "Leave that out, to have tokens alone computed.",
    PADDING,
)
PADDING_COLLECTIVES = Cause(
    "padding-collectives",
    "the graph has collectives, and ranks have other batches",
    "Nothing to do: ranks must run one graph.",
    PADDING,
)
PADDING_GUARD_FAILED = Cause(
    "padding-guard-failed",
    "a call ran with its padding, since this does not hold of its batch: {guards}",
    "Pad to the side that it says, or give what it says for padding, to have tokens alone computed.",
    PADDING,
)
PADDINGS_MEET = Cause(
    "paddings-meet",
    "paddings that are taken out by themselves meet",
    "Pad once, and keep tensors of other paddings apart.",
    PADDING,
)
PADDINGS_TOGETHER = Cause(
    "paddings-together",
    "tokens of several paddings are put together",
    "Pad once, and keep tensors of other paddings apart.",
    PADDING,
)
PADDING_OP = Cause(
    "padding-op", "{op} may mix tokens", "Do it before tokens are padded, or after padding is taken out.", PADDING
)
PADDING_SPLIT = Cause(
    "padding-split",
    "{op} splits the dim of the tokens",
    "Keep sequences and positions as they were padded, a dim each.",
    PADDING,
)
PADDING_ARGUMENTS = Cause(
    "padding-arguments",
    "{op} takes padded tensors elsewhere than as its input",
    "Do it before tokens are padded, or after padding is taken out.",
    PADDING,
)
PADDING_ALONG = Cause(
    "padding-along",
    "{op} runs over sequences or positions",
    "Nothing to do, if it is meant to: it mixes tokens, padding among them.",
    PADDING,
)
PADDING_KEYWORD = Cause(
    "padding-keyword", "{op} takes a tensor as a keyword argument", "Pass the tensor by position.", PADDING
)
PADDING_OTHER_PLACES = Cause(
    "padding-other-places",
    "{op} puts tokens of other positions together",
    "Do it before tokens are padded, or after padding is taken out.",
    PADDING,
)
PADDING_SOME_ROWS = Cause(
    "padding-some-rows",
    "{op} takes a tensor for some tokens",
    "Give a tensor that has all sequences and positions, or broadcasts over them.",
    PADDING,
)
PADDING_BY_POSITION = Cause(
    "padding-by-position",
    "{op} takes a tensor with positions outside of sequences",
    "Keep sequences first, and positions second.",
    PADDING,
)
PADDING_PER_SEQUENCE = Cause(
    "padding-per-sequence",
    "{op} takes a tensor for each sequence that has no dim for positions",
    "Keep sequences and positions a dim each, so that the tensor is [B, 1, ...].",
    PADDING,
)
PADDING_VIEW = Cause(
    "padding-view",
    "{op} does not keep tokens apart",
    "Keep sequences and positions as they were padded, a dim each.",
    PADDING,
)
PADDING_CAST = Cause(
    "padding-cast", "a cast is to the dtype of a padded tensor, or to another device", "Cast with .to(dtype).", PADDING
)
PADDING_MATRICES = Cause(
    "padding-matrices", "a padded tensor is multiplied by several matrices", "Multiply by one matrix.", PADDING
)
PADDING_JOINED = Cause(
    "padding-joined",
    "padded tensors are joined with others",
    "Join them before tokens are padded, or after padding is taken out.",
    PADDING,
)
PADDING_JOINED_PLACES = Cause(
    "padding-joined-places", "tokens of other positions are joined", "Join tensors that were padded alike.", PADDING
)
PADDING_EMBEDDING = Cause(
    "padding-embedding",
    "the gradient of an embedding depends on all tokens",
    "Leave out scale_grad_by_freq and sparse.",
    PADDING,
)
PADDING_OPAQUE = Cause(
    "padding-opaque",
    "opaque code takes padded tensors",
    "Do what a hook or an autograd.Function does before tokens are padded, or after padding is taken out.",
    PADDING,
)
PADDING_OUT_OF_DIMS = Cause(
    "padding-out-of-dims",
    "tokens are taken out of a tensor whose first dims are not those of the padding",
    "Bring sequences and positions to the front first.",
    PADDING,
)
PADDING_OTHER_OFFSETS = Cause(
    "padding-other-offsets",
    "tokens are taken out by other offsets than they were padded by",
    "Use the same offsets.",
    PADDING,
)
PADDING_OTHER_MASK = Cause(
    "padding-other-mask",
    "tokens are taken out by a mask that is not known to leave out the padding",
    "Use the mask that they were padded by, computed in the graph.",
    PADDING,
)
PADDING_IN_MASK = Cause(
    "padding-in-mask",
    "a mask or bias of an attention is made of padded tensors",
    "Make masks of lengths, offsets and positions.",
    PADDING,
)
PADDING_OF_KEYS_ALONE = Cause(
    "padding-of-keys-alone", "keys and values are not padded alike", "Pad keys and values by the same lengths.", PADDING
)
PADDING_LOG_SUM_EXP = Cause(
    "padding-log-sum-exp",
    "the log-sum-exp of the scores is used",
    "Nothing to do: packed rows have no log-sum-exp of padded ones.",
    PADDING,
)
PADDING_OTHER_LENGTHS = Cause(
    "padding-other-lengths",
    "keys and values are padded by other lengths",
    "Pad keys and values by the same lengths.",
    PADDING,
)
PADDING_NO_SPEC = Cause(
    "padding-no-spec",
    "there is no packed attention for it: {error}",
    "Nothing to do, unless it says what to change.",
    PADDING,
)
PADDING_ONE_SEQUENCE = Cause(
    "padding-one-sequence",
    "an attention has no batch dim for sequences, or not one dim for positions",
    "Call the attention on [B, heads, positions, D].",
    PADDING,
)
PADDING_OTHER_BATCH = Cause(
    "padding-other-batch",
    "the first batch dim of an attention is not that of the sequences",
    "Keep sequences as the first dim.",
    PADDING,
)
PADDING_NOT_HIDDEN = Cause(
    "padding-not-hidden",
    "the attention is not known to hide keys of padding",
    "Compute its mask in the graph, from the lengths or offsets that tokens were padded by.",
    PADDING,
)
PADDING_SHOWN = Cause(
    "padding-shown",
    "what is done to hidden scores may show keys of padding",
    "Mask the scores last, after factors, clamp and tanh.",
    PADDING,
)
PADDING_BIAS_AFTER = Cause(
    "padding-bias-after",
    "a bias is added to hidden scores, and may show keys of padding",
    "Add the bias before the mask, or fill with float('-inf').",
    PADDING,
)
PADDING_QUERY_WITHOUT_KEYS = Cause(
    "padding-query-without-keys",
    "a query without keys would see padding",
    "Fill with float('-inf'), by scaled_dot_product_attention, which gives 0 for fully masked rows.",
    PADDING,
)
PADDING_NEAR_FILL = Cause(
    "padding-near-fill",
    "keys of padding are filled with a number that a score may come near to",
    "Fill with float('-inf') or torch.finfo(dtype).min.",
    PADDING,
)
PADDING_MASKED_ROW = Cause(
    "padding-masked-row",
    "a row may be fully masked, and would see padding",
    "Let every token see itself, or fill with float('-inf').",
    PADDING,
)
PADDING_CHECKPOINT = Cause(
    "padding-checkpoint",
    "padded tensors go into a checkpointed region",
    "Pad inside of the region, or leave out checkpointing.",
    PADDING,
)
PADDING_PARTLY_NO_GRAD = Cause(
    "padding-partly-no-grad",
    "part of what is padded is computed without gradients",
    "Put all of it under torch.no_grad, or nothing of it.",
    PADDING,
)
PADDING_WRITES_NEAR = Cause(
    "padding-writes-near", "something is written in place while padded tensors are worked on", _OUT_OF_PLACE, PADDING
)
PADDING_USED = Cause("padding-used", "a padded tensor is used by {user}", "Take the padding out before that.", PADDING)
PADDING_WRITTEN = Cause("padding-written", "a padded tensor is written in place", _OUT_OF_PLACE, PADDING)
PADDING_AUTOCAST = Cause(
    "padding-autocast",
    "an autocast region begins or ends while tensors are padded",
    "Let autocast begin before tokens are padded, and end after padding is taken out.",
    PADDING,
)

TILING_FAILED = Cause(
    "tiling-failed",
    "the all-reduces of a graph are left as they are ({error})",
    "Please report it with the graph; leave out the option tile_all_reduce until then.",
    TILING,
)
TILING_REDUCTION = Cause(
    "tiling-reduction",
    "a reduction by {how}, not a sum",
    "Nothing: products that are cut must be summed over ranks.",
    TILING,
)
TILING_WAIT = Cause(
    "tiling-wait",
    "what is sent is read otherwise than by one wait",
    "Wait for the result once, and use what that gives.",
    TILING,
)
TILING_NO_PRODUCT = Cause(
    "tiling-no-product",
    "what is summed over ranks is no mm or addmm, nor a sum, a cast or a view of such",
    "Nothing: what is computed otherwise is not cut into rows.",
    TILING,
)
TILING_USERS = Cause(
    "tiling-users",
    "the product is read by others before it is summed over ranks",
    "Use the sum over ranks alone.",
    TILING,
)
TILING_SYMBOLIC = Cause(
    "tiling-symbolic",
    "the sizes of the product are not known when the graph is compiled",
    "Compile with dynamic=False.",
    TILING,
)
TILING_GROUP = Cause(
    "tiling-group",
    "the process group is not known here ({error})",
    "Compile in the processes that run the graph.",
    TILING,
)
TILING_UNEVEN = Cause(
    "tiling-uneven",
    "a DTensor is not cut evenly, so that ranks might choose different numbers of blocks",
    "Give the number of blocks: options={'tile_all_reduce': 4}.",
    TILING,
)
TILING_SMALL = Cause(
    "tiling-small",
    "{rows} rows of {columns} over {ranks} ranks: blocks would cost more than they save",
    "Nothing; or give the number of blocks: options={'tile_all_reduce': 4}.",
    TILING,
)


HEADS_NOT_SHARED_OUT = Cause(
    "heads-not-shared-out",
    "no batch dims or heads can be dealt to {ranks} ranks in equal parts ({dims})",
    "Give `heads` a number that divides the key heads, or the query heads that share one, or leave it at 1.",
    GRAPHS,
)


CATALOGUE: Mapping[str, Cause] = types.MappingProxyType(
    {value.name: value for value in list(globals().values()) if isinstance(value, Cause)}
)


def page() -> str:
    """The text of docs/refusals.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "# Why an attention is not fused, and what to do"
    yield ""
    yield "`cause` of a `SiteReport` names one of these ([api.md](api.md)); `reason` is its sentence, with words of the graph in"
    yield "the place of what stands in braces. Made from `attnfuse/reasons.py` by `make refusals`."
    for group, what in GROUPS.items():
        yield from ("", f"## {group}", what, "", "| cause | says | what to do |", "| --- | --- | --- |")
        for cause in CATALOGUE.values():
            if cause.group == group:
                yield f"| `{cause.name}` | {cause.sentence} | {cause.advice} |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
