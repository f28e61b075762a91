"""The plain Vision Transformer of "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580).

A model is two things: its parameters, a nested dict of float32 arrays named as in the published
checkpoints, and a `Config`, which says what those arrays cannot. `forward` takes both.

    python model.py [--variant=S/16 --image_size=224 --posemb=sincos2d --pool=gap --head=mlp]

prints every parameter in the order of the layers, their number, and the cost of one image.

Shapes: B batch, I image side, P patch side, L tokens, D width, N heads, H head dim (D = N*H), M MLP
width, C classes. In einsums they are lower case; y and x are rows and columns of patches, i and j
those of pixels in a patch, c the three colours, e another D.
"""

import functools
import json
import math
import re
import sys
from typing import NamedTuple
import zlib

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

# --- Sizes and parameters -------------------------------------------------------------------------

# name: (D width, number of blocks, M MLP width, N heads)
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
CHOICES = {
    "posemb": ("sincos2d", "learned"),  # position embedding: a constant, or an array
    "pool": ("gap", "cls"),  # classify the mean of the tokens, or the output of one token more
    "head": ("mlp", "linear"),  # one hidden tanh layer before the classifier, or none
    "dtype": ("bfloat16", "float32"),
    "attention": ("xla", "cudnn"),  # the latter for NVIDIA GPUs; the same function
}


class WeightsError(ValueError):
  """A file or a model that is not what was expected; the message says what to do."""


class Config(NamedTuple):
  """What a model is beside its arrays. A flag of train.py with a field's name is that field."""

  variant: str = "S/16"  # a key of VARIANTS and the patch side P
  image_size: int = 224  # I, in pixels
  posemb: str = "sincos2d"
  pool: str = "gap"
  head: str = "mlp"
  num_classes: int = 1000  # C
  dtype: str = "bfloat16"  # of products in the blocks and of what lies between them
  attention: str = "xla"  # how, not what: a checkpoint always says "xla"

  @property
  def sizes(self):
    """(P, D, number of blocks, M, N); WeightsError if a field is none of those that are known."""
    name, _, patch = self.variant.partition("/")
    if name not in VARIANTS or not re.fullmatch("[1-9][0-9]*", patch):
      raise WeightsError(f"--variant={self.variant}: expected one of {', '.join(VARIANTS)} and a "
                       "patch size, such as S/16")
    if self.image_size < int(patch) or self.image_size % int(patch):
      raise WeightsError(f"--image_size={self.image_size}: expected a multiple of the patch size, "
                       f"{patch} (variant {self.variant})")
    for field, known in CHOICES.items():
      if getattr(self, field) not in known:
        raise WeightsError(f"--{field}={getattr(self, field)}: expected {' or '.join(known)}")
    return int(patch), *VARIANTS[name]


def parameter_table(config=Config()):
  """Every parameter's name, shape and initialiser: {name: (shape, function(key, shape) -> array)}.

  Without classes there is no head. WeightsError: a field of the config is none that is known.
  """
  P, D, blocks, M, N = config.sizes
  H, L, C = D // N, (config.image_size // P) ** 2, config.num_classes
  zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
  normal, xavier = jax.nn.initializers.normal, jax.nn.initializers.xavier_uniform
  lecun = jax.nn.initializers.lecun_normal()  # fan-in P*P*3 for the patches, D for a matrix
  # Query, key, value and out are D x D matrices, bounded by sqrt(6 / 2D) = 0.088. With the default
  # axes, the first would be a receptive field, and the bound 0.015 (of out 0.047).
  to_heads, from_heads = xavier(in_axis=0, out_axis=(1, 2)), xavier(in_axis=(0, 1), out_axis=2)

  table = {}

  def layer(name, shape, kernel, bias=zeros, outputs=1):  # the bias has the last `outputs` axes
    table[f"{name}/kernel"], table[f"{name}/bias"] = (shape, kernel), (shape[-outputs:], bias)

  def norm(name):
    table[f"{name}/scale"], table[f"{name}/bias"] = ((D,), ones), ((D,), zeros)

  layer("embedding", (P, P, 3, D), lecun)
  if config.posemb == "learned":
    table["pos_embedding"] = ((1, L, D), normal(1 / math.sqrt(D)))
  if config.pool == "cls":
    table["cls"] = ((1, 1, D), zeros)
  for i in range(blocks):
    name = f"Transformer/encoderblock_{i}"
    norm(f"{name}/LayerNorm_0")
    for projection in ("query", "key", "value"):
      layer(f"{name}/MultiHeadDotProductAttention_0/{projection}", (D, N, H), to_heads, outputs=2)
    layer(f"{name}/MultiHeadDotProductAttention_0/out", (N, H, D), from_heads)
    norm(f"{name}/LayerNorm_1")
    layer(f"{name}/MlpBlock_0/Dense_0", (D, M), xavier(), normal(1e-6))
    layer(f"{name}/MlpBlock_0/Dense_1", (M, D), xavier(), normal(1e-6))
  norm("Transformer/encoder_norm")
  if config.head == "mlp":
    layer("pre_logits", (D, D), lecun)
  if C:
    layer("head", (D, C), zeros)  # zero, so that the first loss is exactly log(C)
  return table


def init_params(seed, config=Config()):
  """Draws the parameters: a nested dict of float32 arrays.

  An array depends on the seed and on its own name alone: an ablation changes no other array.
  """
  key = jax.random.key(seed)
  return unflatten({name: init(jax.random.fold_in(key, zlib.crc32(name.encode())), shape)
                    for name, (shape, init) in parameter_table(config).items()})


def flatten(tree):
  """{"head": {"bias": x}} -> {"head/bias": x}, for any tree: the published checkpoints' names."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat):
  """{"head/bias": x} -> {"head": {"bias": x}}."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


# --- Layers, in the order in which an image meets them --------------------------------------------

# float32 means float32: by default TPUs and recent GPUs round what they multiply.
PRECISION = {"float32": "highest", "bfloat16": "default"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec, x, kernel):
  """`jnp.einsum(spec, x, kernel)` in the type of x; the gradient of the kernel is float32.

  Autodiff would return that gradient in the type of x, so that several devices would round their
  parts of it to bfloat16 before they add them up. This derivative keeps what was accumulated.
  """
  return jnp.einsum(spec, x, kernel.astype(x.dtype))


def _product_backward(spec, inputs, gradient):
  (x, kernel), (left, right, out) = inputs, re.split(",|->", spec)
  return (jnp.einsum(f"{out},{right}->{left}", gradient, kernel.astype(x.dtype)),
          jnp.einsum(f"{left},{out}->{right}", x, gradient, preferred_element_type=jnp.float32))


product.defvjp(lambda spec, x, kernel: (product(spec, x, kernel), (x, kernel)), _product_backward)


def dense(spec, p, x):
  """`einsum(spec, x, kernel) + bias`, in the type of x; gradients of parameters are float32."""
  if x.dtype == jnp.float32:  # autodiff does what `product` does, in an order that suits a CPU
    return jnp.einsum(spec, x, p["kernel"], precision="highest") + p["bias"]
  return (product(spec, x, p["kernel"]) + p["bias"]).astype(x.dtype)


def sincos2d(h, w, D):
  """The fixed position embedding [h*w, D] float32, row by row (MoCo v3, arXiv 2104.02057)."""
  y, x = np.mgrid[:h, :w].reshape(2, -1, 1)
  omega = 10_000.0 ** (-np.arange(D // 4) / (D / 4 - 1))
  waves = [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
  return np.concatenate(waves, 1).astype(np.float32)


def embed(params, images, config):
  """Images [B, I, I, 3] -> tokens [B, L, D] float32: patches, their positions, perhaps [cls]."""
  P, D, *_ = config.sizes
  B, h, w = images.shape[0], images.shape[1] // P, images.shape[2] // P
  # A convolution of stride P is one matrix product over patches of i x j pixels and c colours.
  patches = images.astype(config.dtype).reshape(B, h, P, w, P, 3).swapaxes(2, 3)
  x = dense("byxijc,ijcd->byxd", params["embedding"], patches).reshape(B, h * w, D)
  x += params["pos_embedding"] if config.posemb == "learned" else sincos2d(h, w, D)
  if config.pool == "cls":  # prepended after the positions are added: [cls] has none
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (B, 1, D)), x], 1)
  return x


def layer_norm(p, x):
  """Normalises the last axis of x float32, with eps 1e-6 (Ba et al., arXiv 1607.06450).

  The variance is E[x^2] - E[x]^2, as in the library that the published code builds on.
  """
  return jax.nn.standardize(x, epsilon=1e-6) * p["scale"] + p["bias"]


def queries_keys_values(p, x):
  """The three projections of tokens [B, L, D] -> [B, L, N, H] each."""
  return [dense("bld,dnh->blnh", p[name], x) for name in ("query", "key", "value")]


def recomputed_in_float32(function, dtype):
  """The function, which in float32 keeps only its arguments for the backward pass.

  A CPU computes the rest again sooner than it finds memory for it; a TPU does not.
  """
  return jax.checkpoint(function) if dtype == jnp.float32 else function


def attention_probs(q, k):
  """softmax(q k^T / sqrt(H)) of queries and keys [B, L, N, H]: float32 [B, N, L, L]."""
  scores = jnp.einsum("bqnh,bknh->bnqk", q, k, precision=PRECISION[q.dtype.name],
                      preferred_element_type=jnp.float32)
  return jax.nn.softmax(scores / math.sqrt(q.shape[-1]))


def attention(p, x, config):
  """Multi-head self-attention, [B, L, D] -> [B, L, D]."""
  q, k, v = queries_keys_values(p, x)
  # cuDNN never stores the L x L matrices. It takes bfloat16; an odd L, as with a [cls] token, is
  # not for every version of JAX. Elsewhere it is two products, the first recomputed in float32.
  if config.attention == "cudnn" and x.dtype == jnp.bfloat16 and x.shape[1] % 2 == 0:
    y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  else:
    probs = recomputed_in_float32(attention_probs, x.dtype)(q, k).astype(x.dtype)
    y = jnp.einsum("bnqk,bknh->bqnh", probs, v, precision=PRECISION[x.dtype.name])
  return dense("blnh,nhd->bld", p["out"], y)


def mlp(p, x):
  """Two layers around the tanh form of GELU (arXiv 1606.08415), [B, L, D] -> [B, L, D]."""
  gelu = recomputed_in_float32(functools.partial(jax.nn.gelu, approximate=True), x.dtype)
  return dense("blm,md->bld", p["Dense_1"], gelu(dense("bld,dm->blm", p["Dense_0"], x)))


def block(p, x, config):
  """One pre-LN encoder block, [B, L, D] -> [B, L, D]. The residual stream x stays float32."""
  y = layer_norm(p["LayerNorm_0"], x).astype(config.dtype)
  x += attention(p["MultiHeadDotProductAttention_0"], y, config)
  y = layer_norm(p["LayerNorm_1"], x).astype(config.dtype)
  return x + mlp(p["MlpBlock_0"], y)


def encode(params, images, config, blocks, remat=False):
  """Images [B, I, I, 3] -> tokens [B, L, D] float32 after the first `blocks` blocks."""
  x = embed(params, images, config)
  apply = jax.checkpoint(block, static_argnums=2) if remat else block
  for i in range(blocks):
    x = apply(params["Transformer"][f"encoderblock_{i}"], x, config)
  return x


def classify(params, x, config):
  """Tokens [B, L, D] -> logits [B, C], all float32: LayerNorm of all tokens, pooling, head."""
  x = layer_norm(params["Transformer"]["encoder_norm"], x)
  x = x[:, 0] if config.pool == "cls" else x.mean(1)  # [B, D]
  if config.head == "mlp":
    x = jnp.tanh(dense("bd,de->be", params["pre_logits"], x))
  return dense("bd,dc->bc", params["head"], x)


def forward(params, images, config=Config(), remat=False):
  """Images in [-1, 1], [B, I, I, 3] of any float type -> logits [B, C] float32.

  Args:
    params: nested dict of float32 arrays, of `init_params` or `load`.
    images: rounded to `config.dtype`.
    config: its dtype is that of products and of activations inside a block. Residual stream,
      LayerNorm, softmax and head are float32.
    remat: keep only the tokens between the blocks for the backward pass, to save memory.
  """
  _, _, blocks, *_ = config.sizes
  return classify(params, encode(params, images, config, blocks, remat), config)


def attention_map(params, images, config=Config()):
  """Where the model looks: attention of the last block, averaged over heads, [B, I/P, I/P] float32.

  With [cls] it is what that token attends to, else the mean, over all tokens, of what each does.
  """
  P, _, blocks, *_ = config.sizes
  x = encode(params, images, config, blocks - 1)
  p = params["Transformer"][f"encoderblock_{blocks - 1}"]
  y = layer_norm(p["LayerNorm_0"], x).astype(config.dtype)
  q, k, _ = queries_keys_values(p["MultiHeadDotProductAttention_0"], y)
  probs = attention_probs(q, k).mean(1)  # [B, L, L]
  weights = probs[:, 0, 1:] if config.pool == "cls" else probs.mean(1)
  return weights.reshape(len(images), images.shape[1] // P, -1)


def flops(config=Config()):
  """Floating-point operations of the products for one image, forward; a multiply-add is two."""
  P, D, blocks, *_ = config.sizes
  patches = (config.image_size // P) ** 2
  L = patches + (config.pool == "cls")
  uses = {"embedding": patches, "Transformer": L, "pre_logits": 1, "head": 1}  # tokens it meets
  kernels = sum(uses[name.split("/")[0]] * math.prod(shape)
                for name, (shape, _) in parameter_table(config).items() if name.endswith("/kernel"))
  return 2 * (kernels + blocks * 2 * L * L * D)  # q k^T and probs v


# --- Weights from a file --------------------------------------------------------------------------


class Info(NamedTuple):
  """What a file of weights says about them."""

  config: Config = Config()
  label_names: tuple = ()  # the C classes, in the order of the logits; numbers if it does not say
  recipe: dict = {}  # the flags of train.py that made it; {} if it did not
  step: int = None  # how many updates; None if the file does not say


def read_npz(path, skip=()):
  """{name: array} of an .npz file, without the names that start with one of `skip`.

  Nothing is unpickled. bfloat16, which numpy stores as two raw bytes, is bfloat16 again.

  Raises:
    WeightsError: it is not there, is damaged, or holds anything but arrays of numbers and strings.
  """
  try:
    if "://" in path:  # gs:// and the like
      import tensorflow as tf  # pylint: disable=g-import-not-at-top
      file = tf.io.gfile.GFile(path, "rb")
    else:
      file = open(path, "rb")
    with file, np.load(file) as npz:
      arrays = {name: npz[name] for name in npz.files if not name.startswith(skip)}
    return {name: x.view(jnp.bfloat16) if x.dtype == "V2" else x for name, x in arrays.items()}
  except Exception as error:  # whatever the file system, zipfile and numpy make of something else
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise WeightsError(f"{path} is not a checkpoint that can be read ({reason}); expected an .npz "
                     "file of arrays") from None


# Names in the first releases of the authors' ViTs (vit_jax, augreg), and what they are today.
OLD_NAMES = {
    "Transformer/posembed_input/pos_embedding": "pos_embedding",
    "Transformer/pos_embedding": "pos_embedding",
    "/MultiHeadDotProductAttention_1/": "/MultiHeadDotProductAttention_0/",
    "/LayerNorm_2/": "/LayerNorm_1/",
    "/MlpBlock_3/": "/MlpBlock_0/",
}


def load(path):
  """Reads the weights in an .npz file: a checkpoint of ours, or any of the published families.

  Names may be bare, or under "params/" (as ours) or "opt/target/"; today's, or OLD_NAMES; the
  arrays of all blocks may be stacked into one.

  Returns:
    params: nested dict of float32 arrays, as of `init_params`; without "head" if there is none.
    info: an `Info`; its config has 0 classes if there is no head.

  Raises:
    WeightsError: no such file, no ViT in it that this code knows, or arrays that are missing,
      unknown, of another shape, not floats or not finite; the message lists them all.
  """
  rest = read_npz(path, skip=("opt_state/", "opt/state/"))
  prefix = next((p for p in ("params/", "opt/target/") if any(k.startswith(p) for k in rest)), "")
  params = {}
  for name in [name for name in rest if name.startswith(prefix)]:
    array = rest.pop(name)
    name = name.removeprefix(prefix)
    for old, new in OLD_NAMES.items():
      name = name.replace(old, new)
    stacked = name.removeprefix("Transformer/encoderblock/")
    params |= {name: array} if stacked == name else {
        f"Transformer/encoderblock_{i}/{stacked}": x for i, x in enumerate(np.atleast_1d(array))}
  try:
    posemb = params.get("pos_embedding", np.zeros([1, 0, 0]))
    if "cls" in params and math.isqrt(posemb.shape[1]) ** 2 < posemb.shape[1]:
      # Older models added a position to [cls], too: fold it into cls.
      params |= {"cls": params["cls"] + posemb[:, :1], "pos_embedding": posemb[:, 1:]}
    config = _config_of({name: x.shape for name, x in params.items()}, rest)
    table = parameter_table(config)
  except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
    raise WeightsError(f"--init={path}: no ViT in it that this code knows ({error})") from None
  wrong = [f"{name} missing" for name in table.keys() - params.keys()]
  wrong += [f"{name} unknown" for name in params.keys() - table.keys()]
  for name in table.keys() & params.keys():
    x, shape = params[name], table[name][0]
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating):
      wrong.append(f"{name} {x.dtype} {x.shape}, expected floats {shape}")
    elif not np.isfinite(x.astype(np.float32)).all():
      wrong.append(f"{name} not finite")
  if wrong:
    raise WeightsError(f"--init={path} does not fit: {'; '.join(sorted(wrong))}")
  names = rest.get("label_names", np.arange(config.num_classes).astype(str))
  info = Info(config, tuple(names.tolist()), json.loads(rest.get("flags", np.array("{}")).item()),
              int(rest["step"]) if "step" in rest else None)
  return unflatten({name: x.astype(np.float32) for name, x in params.items()}), info


def _config_of(shapes, rest):
  """The Config of parameters {name: shape}: what the file says of itself, or what they show."""
  C, = shapes.get("head/bias", (0,))
  if "config" in rest:  # a checkpoint of ours; a field that this code does not know is a TypeError
    return Config(**json.loads(rest["config"].item()))._replace(num_classes=C)
  P, _, _, D = shapes["embedding/kernel"]
  M, = shapes["Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias"]
  N, _ = shapes["Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias"]
  _, L, _ = shapes.get("pos_embedding", (1, 0, D))
  sizes = D, sum(name.endswith("/query/bias") for name in shapes), M, N
  if sizes not in VARIANTS.values():
    raise ValueError(f"its width, blocks, MLP width and heads, {sizes}, are not in model.VARIANTS")
  variant = next(name for name, known in VARIANTS.items() if known == sizes)
  config = Config(f"{variant}/{P}", math.isqrt(L) * P or Config().image_size,
                  "learned" if L else "sincos2d", "cls" if "cls" in shapes else "gap",
                  "mlp" if "pre_logits/kernel" in shapes else "linear", C)
  older = json.loads(rest["flags"].item()) if "flags" in rest else {}  # of ours, too
  return config._replace(**{k: older[k] for k in ("image_size", "dtype") if k in older})


def fit(params, old, new):
  """Parameters of the Config `old` for `new`, which may differ in image size, classes and dtype.

  A learned position embedding is resampled. WeightsError if anything else differs.
  """
  for field in ("variant", "posemb", "pool", "head"):
    have, want = getattr(old, field), getattr(new, field)
    if have != want:
      raise WeightsError(f"--{field}={want} contradicts --init, which holds {field}={have}")
  L = (new.image_size // new.sizes[0]) ** 2
  if new.posemb == "learned" and params["pos_embedding"].shape[1] != L:
    params = params | {"pos_embedding": resample_posemb(params["pos_embedding"], L)}
  return params


def resample_posemb(posemb, L):
  """A learned position embedding [1, h*h, D] for another square grid: bilinear, corners aligned."""
  old, new = math.isqrt(posemb.shape[1]), math.isqrt(L)
  grid = posemb.reshape(old, old, -1)
  where = np.linspace(0, old - 1, new)
  for axis in (0, 1):
    grid = np.apply_along_axis(lambda x: np.interp(where, np.arange(old), x), axis, grid)
  return grid.reshape(1, L, -1).astype(np.float32)


def main(_):
  config = Config(**{field: FLAGS[field].value for field in Config._fields})
  try:
    table = parameter_table(config)
  except WeightsError as error:
    sys.exit(f"Error: {error}")
  params = flatten(init_params(0, config))
  for name in table:  # in this order, which is the layers'
    x = params[name]
    print(f"{name:76} {str(x.shape):19} {x.size:10,}  mean {x.mean():9.2e}  std {x.std():8.2e}")
  print(f"{sum(x.size for x in params.values()):,} parameters. One {config.image_size} x "
        f"{config.image_size} image: {flops(config) / 1e9:.2f} GFLOP forward, three times that in "
        "training.")


if __name__ == "__main__":
  FLAGS = flags.FLAGS
  for _name, _default in Config._field_defaults.items():
    _define = flags.DEFINE_integer if isinstance(_default, int) else flags.DEFINE_string
    _define(_name, _default, "A field of Config.")
  app.run(main)
