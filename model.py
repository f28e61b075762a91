"""The plain Vision Transformer of "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580), in JAX functions.

A model is a nested dict of arrays, named as in the published checkpoints, and nothing else: `forward` reads the
architecture off the arrays it is given. There is a [cls] token if there is a `cls` array, an MLP head if there is a
`pre_logits` array, learned position embeddings if there is a `pos_embedding` array; the patch size, the depth and the
number of heads are the shapes of kernels. Every ablation of the model is therefore one line of `parameter_table`.

    python model.py [--variant=S/16 --image_size=224 --posemb=sincos2d --pool=gap --head=mlp --num_classes=1000]

prints that table, the number of parameters and the cost of one image.

Shapes: B batch, I image side, P patch side, L tokens, D width, N heads, H head dim (D = N*H), M MLP width, C classes.
In einsums they are lower case; q and k are L of the queries and of the keys, e is another D.
"""

import functools
import math
import re
import sys
import zlib

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

# name: (D width, depth, M MLP width, N heads)
VARIANTS = {
    "demo": (64, 4, 256, 1),  # ours, for the demo on a laptop; all others are the published ones
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}


# --- Parameters -------------------------------------------------------------------------------------------------------


def parameter_table(variant="S/16", image_size=224, posemb="sincos2d", pool="gap", head="mlp", num_classes=1000):
  """Every parameter's name, shape and initialiser: {name: (shape, function(key, shape) -> float32 array)}.

  Args:
    variant: a key of VARIANTS and the patch side, "S/16".
    image_size: I, in pixels; a multiple of the patch side.
    posemb: "sincos2d" (a constant, hence no parameter) or "learned".
    pool: "gap" (mean over the tokens) or "cls" (an additional token, whose output is classified).
    head: "mlp" (one hidden tanh layer) or "linear".
    num_classes: C.

  Raises:
    ValueError: an argument is none of these; the message says what was expected.
  """
  name, _, patch = variant.partition("/")
  if name not in VARIANTS or not re.fullmatch("[1-9][0-9]*", patch):
    raise ValueError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)} and a patch size, such as S/16")
  P, (D, depth, M, N) = int(patch), VARIANTS[name]
  if image_size < P or image_size % P:
    raise ValueError(f"image_size {image_size}: expected a multiple of the patch size, {P} (variant {variant})")
  for key, value, known in (("posemb", posemb, ("sincos2d", "learned")), ("pool", pool, ("gap", "cls")),
                            ("head", head, ("mlp", "linear"))):
    if value not in known:
      raise ValueError(f"{key} {value!r}: expected {' or '.join(known)}")
  H, L = D // N, (image_size // P) ** 2

  zeros, ones, normal = jax.nn.initializers.zeros, jax.nn.initializers.ones, jax.nn.initializers.normal
  lecun = jax.nn.initializers.lecun_normal()  # fan-in P*P*3 for the patches, D for a matrix
  xavier = jax.nn.initializers.xavier_uniform
  # Query, key, value and out are D x D matrices. The axes are given, as the default ones would take N or D for a
  # receptive field and bound the values by 0.015 instead of sqrt(6 / 2D) = 0.088.
  to_heads, from_heads = xavier(in_axis=0, out_axis=(1, 2)), xavier(in_axis=(0, 1), out_axis=2)

  table = {"embedding/kernel": ((P, P, 3, D), lecun), "embedding/bias": ((D,), zeros)}
  if posemb == "learned":
    table["pos_embedding"] = ((1, L, D), normal(1 / math.sqrt(D)))
  if pool == "cls":
    table["cls"] = ((1, 1, D), zeros)
  for i in range(depth):
    block = {}
    for j in (0, 1):
      block[f"LayerNorm_{j}/scale"] = ((D,), ones)
      block[f"LayerNorm_{j}/bias"] = ((D,), zeros)
    for projection in ("query", "key", "value"):
      block[f"MultiHeadDotProductAttention_0/{projection}/kernel"] = ((D, N, H), to_heads)
      block[f"MultiHeadDotProductAttention_0/{projection}/bias"] = ((N, H), zeros)
    block["MultiHeadDotProductAttention_0/out/kernel"] = ((N, H, D), from_heads)
    block["MultiHeadDotProductAttention_0/out/bias"] = ((D,), zeros)
    block["MlpBlock_0/Dense_0/kernel"] = ((D, M), xavier())
    block["MlpBlock_0/Dense_0/bias"] = ((M,), normal(1e-6))
    block["MlpBlock_0/Dense_1/kernel"] = ((M, D), xavier())
    block["MlpBlock_0/Dense_1/bias"] = ((D,), normal(1e-6))
    table |= {f"Transformer/encoderblock_{i}/{key}": value for key, value in block.items()}
  table["Transformer/encoder_norm/scale"] = ((D,), ones)
  table["Transformer/encoder_norm/bias"] = ((D,), zeros)
  if head == "mlp":
    table["pre_logits/kernel"] = ((D, D), lecun)
    table["pre_logits/bias"] = ((D,), zeros)
  table["head/kernel"] = ((D, num_classes), zeros)  # zero, so that the first loss is exactly log(C)
  table["head/bias"] = ((num_classes,), zeros)
  return table


def init_params(seed, table):
  """Draws the parameters of a `parameter_table`: a nested dict of float32 arrays.

  An array depends on the seed and on its own name alone, so that an ablation changes no other array.
  """
  key = jax.random.key(seed)
  return unflatten({name: init(jax.random.fold_in(key, zlib.crc32(name.encode())), shape)
                    for name, (shape, init) in table.items()})


def flatten(tree):
  """{"head": {"bias": x}} -> {"head/bias": x}, for any tree; the names are those of the published checkpoints."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat):
  """{"head/bias": x} -> {"head": {"bias": x}}."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
  return tree


# --- The model --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec, x, w, dtype):
  """`jnp.einsum(spec, x, w)` with inputs rounded to `dtype`, accumulated and returned in float32.

  With bfloat16 this is what a TPU does to float32 arrays by default, here on every device. It has a derivative of its own
  because autodiff would not round the float32 cotangent, so that the two products of the backward pass would not be in
  `dtype`.
  """
  precision = "highest" if dtype == jnp.float32 else None  # else TPUs and GPUs round float32 inputs all the same
  return jnp.einsum(spec, x.astype(dtype), w.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _einsum_forward(spec, x, w, dtype):
  x = x.astype(dtype)  # the backward pass reads the rounded copy
  return einsum(spec, x, w, dtype), (x, w)


def _einsum_backward(spec, dtype, residuals, cotangent):
  x, w = residuals
  inputs, out = spec.split("->")
  left, right = inputs.split(",")
  return einsum(f"{out},{right}->{left}", cotangent, w, dtype), einsum(f"{left},{out}->{right}", x, cotangent, dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)


def dense(spec, p, x, dtype):
  """The affine map `einsum(spec, x, kernel) + bias`."""
  return einsum(spec, x, p["kernel"], dtype) + p["bias"]


# The backward pass recomputes what these two hold inside, which is cheap, and so keeps only their input.


@jax.checkpoint
def layer_norm(p, x):
  """Normalises the last axis of x float32, with eps 1e-6 (Ba et al., arXiv 1607.06450)."""
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


@jax.checkpoint
def gelu(x):
  """The tanh form of GELU (Hendrycks & Gimpel, arXiv 1606.08415), which the published run uses.

  x/2 (1 + tanh u) is x / (1 + exp(-2u)). As a division, because XLA repeats what it takes for cheap, such as a product, in
  each of its readers; one of them reads it transposed, which on a CPU takes a sixth of the step.
  """
  u = math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)
  return x / (1 + jnp.exp(jnp.minimum(-2 * u, 80)))  # 80: exp stays finite, and its derivative a number


jax.config.update("jax_softmax_custom_jvp", True)  # the backward pass of jax.nn.softmax keeps its result, not its parts


def sincos2d(h, w, D):
  """The fixed position embedding, [h*w, D] float32, tokens in row-major order (MoCo v3, arXiv 2104.02057)."""
  y, x = np.mgrid[:h, :w].reshape(2, -1, 1)
  omega = 10_000.0 ** (-np.arange(D // 4) / (D / 4 - 1))
  return np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], 1).astype(np.float32)


def embed(params, images, dtype):
  """Images [B, I, I, 3] -> tokens [B, L, D]: patches, position embedding, [cls] token if the model has one."""
  P, _, _, D = params["embedding"]["kernel"].shape
  B, h, w = images.shape[0], images.shape[1] // P, images.shape[2] // P
  # A convolution of stride P is one matrix product over patches.
  patches = images.reshape(B, h, P, w, P, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, h * w, P * P * 3)
  p = params["embedding"]
  x = dense("blp,pd->bld", {"kernel": p["kernel"].reshape(P * P * 3, D), "bias": p["bias"]}, patches, dtype)
  x += params["pos_embedding"] if "pos_embedding" in params else sincos2d(h, w, D)
  if "cls" in params:  # prepended after the position embedding is added: [cls] has no position
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (B, 1, D)), x], 1)
  return x


def queries_keys_values(p, x, dtype):
  """The three projections of normalised tokens [B, L, D] -> [B, N, L, H] each, as one product, which is faster."""
  D, N, H = p["query"]["kernel"].shape
  names = ("query", "key", "value")
  joined = {"kernel": jnp.concatenate([p[name]["kernel"].reshape(D, D) for name in names], 1),  # [D, 3*D]
            "bias": jnp.concatenate([p[name]["bias"].reshape(D) for name in names])}
  return [y.reshape(*x.shape[:2], N, H).swapaxes(1, 2) for y in jnp.split(dense("bld,de->ble", joined, x, dtype), 3, -1)]


def attention_probs(q, k, dtype):
  """softmax(q k^T / sqrt(H)) for q, k [B, N, L, H] -> [B, N, L, L] float32."""
  return jax.nn.softmax(einsum("bnqh,bnkh->bnqk", q, k, dtype) / math.sqrt(q.shape[-1]))


def attention(q, k, v, dtype):
  """Multi-head self-attention, q, k, v [B, N, L, H] -> [B, L, N, H] float32."""
  # cuDNN's attention never stores the [L, L] matrices. Its derivative takes an even L only, which a [cls] token makes odd.
  if jax.default_backend() == "gpu" and dtype == jnp.bfloat16 and q.shape[2] % 2 == 0:
    q, k, v = (x.astype(dtype).swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").astype(jnp.float32)
  return einsum("bnqk,bnkh->bnqh", attention_probs(q, k, dtype), v, dtype).swapaxes(1, 2)


def block(p, x, dtype):
  """One pre-LN encoder block, [B, L, D] -> [B, L, D]. The residual stream stays float32."""
  attn, mlp = p["MultiHeadDotProductAttention_0"], p["MlpBlock_0"]
  y = attention(*queries_keys_values(attn, layer_norm(p["LayerNorm_0"], x), dtype), dtype)
  x += dense("blnh,nhd->bld", attn["out"], y, dtype)
  y = gelu(dense("bld,dm->blm", mlp["Dense_0"], layer_norm(p["LayerNorm_1"], x), dtype))
  return x + dense("blm,md->bld", mlp["Dense_1"], y, dtype)


def classify(params, x, dtype):
  """Tokens [B, L, D] -> logits [B, C] float32: final LayerNorm on all tokens, then pooling, then the head."""
  x = layer_norm(params["Transformer"]["encoder_norm"], x)
  x = x[:, 0] if "cls" in params else x.mean(1)  # [B, D]; without [cls], all tokens are patches
  if "pre_logits" in params:
    x = jnp.tanh(dense("bd,de->be", params["pre_logits"], x, dtype))
  return dense("bd,dc->bc", params["head"], x, dtype)


def forward(params, images, dtype=jnp.bfloat16, remat=False):
  """Images in [-1, 1], [B, I, I, 3] -> logits [B, C] float32.

  Args:
    params: nested dict of float32 arrays, of a `parameter_table`.
    images: of any float dtype; rounded to `dtype`.
    dtype: what matrix products read; they accumulate in float32.
    remat: keep only the tokens between the blocks for the backward pass; saves memory, costs one more forward pass.
  """
  x = embed(params, images, dtype)
  apply_block = jax.checkpoint(block, static_argnums=2) if remat else block
  for i in range(depth(params)):
    x = apply_block(params["Transformer"][f"encoderblock_{i}"], x, dtype)
  return classify(params, x, dtype)


def depth(params):
  """The number of encoder blocks."""
  return sum(name.startswith("encoderblock_") for name in params["Transformer"])


def attention_map(params, images, dtype=jnp.float32):
  """Where the model looks: attention of the last block, averaged over heads, [B, I/P, I/P] float32.

  It is what the [cls] token attends to, or, as pooling takes the mean of all tokens, the mean over what they attend to.
  """
  x, P = embed(params, images, dtype), params["embedding"]["kernel"].shape[0]
  *blocks, last = (params["Transformer"][f"encoderblock_{i}"] for i in range(depth(params)))
  for p in blocks:
    x = block(p, x, dtype)
  q, k, _ = queries_keys_values(last["MultiHeadDotProductAttention_0"], layer_norm(last["LayerNorm_0"], x), dtype)
  probs = attention_probs(q, k, dtype).mean(1)  # [B, L, L]
  weights = probs[:, 0, 1:] if "cls" in params else probs.mean(1)
  return weights.reshape(len(images), images.shape[1] // P, -1)


def flops(table, image_size):
  """Floating-point operations of the matrix products in the forward pass of one image, a multiply-add as two.

  Args:
    table: a `parameter_table`.
    image_size: I, in pixels.
  """
  shapes = {name: shape for name, (shape, _) in table.items()}
  P, _, _, D = shapes["embedding/kernel"]
  patches = (image_size // P) ** 2
  L = patches + ("cls" in shapes)
  uses = {"embedding": patches, "pre_logits": 1, "head": 1}  # how many tokens a kernel meets; L for all others
  kernels = sum(uses.get(name.split("/")[0], L) * math.prod(shape)
                for name, shape in shapes.items() if name.endswith("/kernel"))
  blocks = sum(name.endswith("/query/kernel") for name in shapes)
  return 2 * (kernels + blocks * 2 * L * L * D)  # q k and probs v


def main(_):
  names = ("variant", "image_size", "posemb", "pool", "head", "num_classes")
  try:
    table = parameter_table(*(FLAGS[name].value for name in names))
  except ValueError as error:
    sys.exit(f"Error: --{error}")
  for name, array in flatten(init_params(0, table)).items():
    print(f"{name:76} {str(array.shape):19} {array.size:10,}  mean {array.mean():9.2e}  std {array.std():8.2e}")
  print(f"{sum(math.prod(shape) for shape, _ in table.values()):,} parameters. One {FLAGS.image_size} x {FLAGS.image_size} "
        f"image: {flops(table, FLAGS.image_size) / 1e9:.2f} GFLOP forward, three times that in training.")


if __name__ == "__main__":
  FLAGS = flags.FLAGS
  flags.DEFINE_string("variant", "S/16", "Model size and patch size.")
  flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
  flags.DEFINE_string("posemb", "sincos2d", "sincos2d or learned.")
  flags.DEFINE_string("pool", "gap", "gap or cls.")
  flags.DEFINE_string("head", "mlp", "mlp or linear.")
  flags.DEFINE_integer("num_classes", 1000, "Classes.")
  app.run(main)
