//! A model file's values and tensors, each checked as it is taken.
use super::ModelError;
use crate::gguf::{FromValue, GgmlType, GgufError, ModelFile, TensorInfo};
use crate::plan::{Embed, Head, Heads, Linear, Norm, NormKind, Residual, Rope, RopePairs};
use crate::quant;
use std::cell::RefCell;
use std::collections::HashSet;
use std::f64::consts::PI;
use std::fmt::Display;

/// A model file as its family's code sees it: keys without the architecture's prefix, tensors by name and shape.
pub struct Parts<'a> {
    file: &'a ModelFile,
    architecture: &'a str,
    taken: RefCell<HashSet<String>>,
}

/// The sizes that nearly all families state under the same keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// `block_count`.
    pub layers: usize,
    /// `embedding_length`.
    pub hidden: usize,
    /// `feed_forward_length`.
    pub ff: usize,
    /// Rows of `token_embd.weight`.
    pub vocab: usize,
    /// `context_length`.
    pub context: usize,
    /// `attention.head_count`, `.head_count_kv` (default: as many), `.key_length` (default: hidden / heads).
    pub heads: Heads,
    /// `attention.layer_norm_rms_epsilon`.
    pub eps: f32,
}

/// Largest size of anything; keeps products of three far from overflow.
const SIZE_MAX: usize = 1 << 20;
const HEAD_DIM_MAX: usize = 1 << 12;
/// Fastest rotation, in radians a position; 1 is usual, and scaling makes it less.
const RADIANS_MAX: f64 = 100.0;

impl<'a> Parts<'a> {
    /// The parts of `file`, whose keys begin with `architecture` and a dot.
    pub fn new(file: &'a ModelFile, architecture: &'a str) -> Parts<'a> {
        Parts { file, architecture, taken: RefCell::default() }
    }

    /// Key `name` of this architecture, if the file has it.
    pub fn optional<T: FromValue<'a>>(&self, name: &str) -> Result<Option<T>, ModelError> {
        Ok(self.file.optional(&self.key(name))?)
    }

    /// A size of at least 1, or `default` where the file doesn't state it.
    pub fn size(&self, name: &str, default: Option<usize>) -> Result<usize, ModelError> {
        let size = match (self.optional::<u32>(name)?, default) {
            (Some(size), _) => size as usize,
            (None, Some(default)) => return Ok(default),
            (None, None) => return Err(GgufError::MissingKey { key: self.key(name) }.into()),
        };
        if (1..=SIZE_MAX).contains(&size) {
            Ok(size)
        } else {
            Err(self.wrong(name, size, format!("1 to {SIZE_MAX} are supported")))
        }
    }

    /// A finite number above 0, or `default` where the file doesn't state it.
    pub fn positive(&self, name: &str, default: Option<f32>) -> Result<f32, ModelError> {
        let value = match (self.optional::<f32>(name)?, default) {
            (Some(value), _) => value,
            (None, Some(default)) => return Ok(default),
            (None, None) => return Err(GgufError::MissingKey { key: self.key(name) }.into()),
        };
        if value.is_finite() && value > 0.0 {
            Ok(value)
        } else {
            Err(self.wrong(name, value, "a finite number above 0 is needed"))
        }
    }

    /// Like [`Parts::positive`], but absent and 0 both mean none.
    pub fn positive_if_any(&self, name: &str) -> Result<Option<f32>, ModelError> {
        match self.optional::<f32>(name)? {
            None | Some(0.0) => Ok(None),
            Some(_) => self.positive(name, None).map(Some),
        }
    }

    /// The error that key `name` has a `value` that it can't have.
    pub fn wrong(&self, name: &str, value: impl Display, expected: impl Into<String>) -> ModelError {
        ModelError::Value { key: self.key(name), value: value.to_string(), expected: expected.into() }
    }

    /// The sizes that nearly all families state under the same keys, checked against each other.
    pub fn shape(&self) -> Result<Shape, ModelError> {
        let hidden = self.size("embedding_length", None)?;
        let layers = self.size("block_count", None)?;
        if layers > self.file.tensors().len() {
            let why = format!("the file's {} tensors can't make so many layers", self.file.tensors().len());
            return Err(self.wrong("block_count", layers, why));
        }
        let heads = self.size("attention.head_count", None)?;
        let kv_heads = self.size("attention.head_count_kv", Some(heads))?;
        if heads % kv_heads != 0 {
            let why = format!("it must divide the {heads} query heads");
            return Err(self.wrong("attention.head_count_kv", kv_heads, why));
        }
        let head_dim = self.size("attention.key_length", Some(hidden / heads))?;
        if head_dim == 0 || head_dim % 32 != 0 || head_dim > HEAD_DIM_MAX {
            let why =
                format!("a multiple of 32 up to {HEAD_DIM_MAX} is needed (hidden / heads if not stated)");
            return Err(self.wrong("attention.key_length", head_dim, why));
        }
        let value_dim = self.size("attention.value_length", Some(head_dim))?;
        if value_dim != head_dim {
            let why = format!("keys have {head_dim}, and only equal lengths are supported");
            return Err(self.wrong("attention.value_length", value_dim, why));
        }
        if self.optional::<bool>("attention.causal")? == Some(false) {
            return Err(self.wrong("attention.causal", false, "only causal attention is supported"));
        }
        let vocab = match self.need("token_embd.weight")?.dims[..] {
            [_, rows] => usize::try_from(rows).unwrap_or(usize::MAX),
            ref found => return Err(shape_error("token_embd.weight", &[hidden as u64], found)),
        };
        Ok(Shape {
            layers,
            hidden,
            ff: self.size("feed_forward_length", None)?,
            vocab,
            context: self.size("context_length", None)?,
            heads: Heads { heads, kv_heads, head_dim },
            eps: self.positive("attention.layer_norm_rms_epsilon", Some(1e-5))?,
        })
    }

    /// The matrix `NAME.weight` with the bias `NAME.bias`, if the file has one.
    pub fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Linear, ModelError> {
        let weight = self.take(&format!("{name}.weight"), &[cols, rows])?;
        Ok(Linear { weight, bias: self.bias(name, rows)?, rows, cols })
    }

    /// The norm `NAME.weight` with the bias `NAME.bias`, if the file has one.
    pub fn norm(&self, kind: NormKind, name: &str, width: usize, eps: f32) -> Result<Norm, ModelError> {
        let weight = self.take(&format!("{name}.weight"), &[width])?;
        Ok(Norm { kind, weight, bias: self.bias(name, width)?, eps })
    }

    /// A residual product without a norm of its own.
    pub fn residual(&self, name: &str, rows: usize, cols: usize) -> Result<Residual, ModelError> {
        Ok(Residual { linear: self.linear(name, rows, cols)?, post_norm: None })
    }

    /// `token_embd.weight`.
    pub fn embed(&self, shape: &Shape, scale: f32) -> Result<Embed, ModelError> {
        Ok(Embed { table: self.take("token_embd.weight", &[shape.hidden, shape.vocab])?, scale })
    }

    /// `output_norm` and `output`, or the embedding's table where the file has no `output`.
    pub fn head(&self, kind: NormKind, shape: &Shape, soft_cap: Option<f32>) -> Result<Head, ModelError> {
        let norm = self.norm(kind, "output_norm", shape.hidden, shape.eps)?;
        let name = if self.has("output.weight") { "output" } else { "token_embd" };
        Ok(Head { norm, linear: self.linear(name, shape.vocab, shape.hidden)?, soft_cap })
    }

    /// Rotation with base `rope.freq_base` (default 10000), scaled as `rope.scaling.*` and the tensor
    /// `rope_freqs.weight` say: see [`Parts::rope_scaled`].
    pub fn rope(&self, pairs: RopePairs, shape: &Shape) -> Result<Rope, ModelError> {
        let dims = self.rope_dims(shape)?;
        let base = self.rope_base("rope.freq_base", 10_000.0)?;
        self.rope_scaled(pairs, dims, base, shape.context)
    }

    /// A base of rotation under key `name`.
    pub fn rope_base(&self, name: &str, default: f32) -> Result<f64, ModelError> {
        match self.positive(name, Some(default))? {
            base if base > 1.0 => Ok(f64::from(base)),
            base => Err(self.wrong(name, base, "a base above 1 is needed")),
        }
    }

    /// Leading elements of a head that rotate: `rope.dimension_count`, by default all.
    pub fn rope_dims(&self, shape: &Shape) -> Result<usize, ModelError> {
        let dims = self.size("rope.dimension_count", Some(shape.heads.head_dim))?;
        if dims % 2 != 0 || dims > shape.heads.head_dim {
            let why = format!("an even number up to the head's {} is needed", shape.heads.head_dim);
            return Err(self.wrong("rope.dimension_count", dims, why));
        }
        Ok(dims)
    }

    /// `inv_freq[i] = base^(-2i/dims) / factor[i]`, `factor` being 1 or `rope_freqs.weight` (Llama 3), then scaled:
    /// `linear` divides by `rope.scaling.factor`; `yarn` (arXiv 2309.00071, beta 32 and 1) does so for the slow pairs
    /// and blends over to the fast ones, and multiplies sine and cosine by `1 + 0.1 ln factor`.
    pub fn rope_scaled(
        &self,
        pairs: RopePairs,
        dims: usize,
        base: f64,
        context: usize,
    ) -> Result<Rope, ModelError> {
        let mut inv_freq: Vec<f64> =
            (0..dims / 2).map(|i| base.powf(-2.0 * i as f64 / dims as f64)).collect();
        if self.has("rope_freqs.weight") {
            let factors = self.values("rope_freqs.weight", dims / 2)?;
            if factors.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
                return Err(ModelError::Unsupported(
                    "rope_freqs.weight has factors that aren't above 0".into(),
                ));
            }
            inv_freq.iter_mut().zip(factors).for_each(|(freq, factor)| *freq /= f64::from(factor));
        }
        let kind = self.optional::<&str>("rope.scaling.type")?.unwrap_or("linear");
        let factor = match self.positive_if_any("rope.scaling.factor")? {
            Some(factor) => f64::from(factor),
            None => f64::from(self.positive_if_any("rope.scale_linear")?.unwrap_or(1.0)),
        };
        let mut magnitude = 1.0;
        match kind {
            "none" => {}
            "linear" => inv_freq.iter_mut().for_each(|freq| *freq /= factor),
            "yarn" => {
                let trained = self.size("rope.scaling.original_context_length", Some(context))? as f64;
                let corner =
                    |turns: f64| dims as f64 * (trained / (turns * 2.0 * PI)).ln() / (2.0 * base.ln());
                let (low, high) = (corner(32.0).floor().max(0.0), corner(1.0).ceil().min(dims as f64 - 1.0));
                for (i, freq) in inv_freq.iter_mut().enumerate() {
                    let slow = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    *freq *= slow / factor + (1.0 - slow);
                }
                magnitude = (1.0 + 0.1 * factor.ln())
                    * f64::from(self.positive("rope.scaling.attn_factor", Some(1.0))?);
            }
            other => {
                let known = "none, linear and yarn are supported";
                return Err(self.wrong("rope.scaling.type", format!("{other:?}"), known));
            }
        }
        let fastest = inv_freq.iter().copied().fold(0.0, f64::max);
        if fastest > RADIANS_MAX || !(magnitude as f32).is_finite() {
            let why = format!("rotation by {fastest:e} radians a position is too fast to mean anything");
            return Err(ModelError::Unsupported(why));
        }
        let inv_freq = inv_freq.into_iter().map(|freq| freq as f32).collect();
        Ok(Rope { pairs, inv_freq, magnitude: magnitude as f32 })
    }

    /// Whether the file has that tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.file.tensor(tensor).is_some()
    }

    /// Every tensor must have been taken.
    pub(super) fn finish(self) -> Result<(), ModelError> {
        let taken = self.taken.into_inner();
        match self.file.tensors().find(|tensor| !taken.contains(&tensor.name)) {
            None => Ok(()),
            Some(tensor) => Err(ModelError::UnusedTensor {
                tensor: tensor.name.clone(),
                architecture: self.architecture.to_owned(),
            }),
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn bias(&self, name: &str, width: usize) -> Result<Option<String>, ModelError> {
        let name = format!("{name}.bias");
        self.has(&name).then(|| self.take(&name, &[width])).transpose()
    }

    /// A small tensor's values.
    fn values(&self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        self.take(name, &[width])?;
        let tensor = self.need(name)?;
        let mut bytes = vec![0; tensor.bytes as usize];
        self.file.read(tensor, 0..tensor.bytes, &mut bytes)?;
        let mut values = vec![0.0; width];
        quant::dequantize(tensor.ty, &bytes, &mut values);
        Ok(values)
    }

    fn need(&self, name: &str) -> Result<&'a TensorInfo, ModelError> {
        self.file.tensor(name).ok_or_else(|| ModelError::MissingTensor { tensor: name.to_owned() })
    }

    /// The name of a tensor that has these dimensions (`ne` order; trailing ones don't count) and can be read.
    fn take(&self, name: &str, dims: &[usize]) -> Result<String, ModelError> {
        let tensor = self.need(name)?;
        let expected: Vec<u64> = dims.iter().map(|&dim| dim as u64).collect();
        let padding = tensor.dims.iter().skip(dims.len());
        if !tensor.dims.starts_with(&expected) || padding.into_iter().any(|&dim| dim != 1) {
            return Err(shape_error(name, &expected, &tensor.dims));
        }
        if let GgmlType::Unknown(_) = tensor.ty {
            let cause = GgufError::UnknownType(tensor.ty);
            return Err(ModelError::TensorType { tensor: name.to_owned(), cause });
        }
        self.taken.borrow_mut().insert(name.to_owned());
        Ok(name.to_owned())
    }
}

fn shape_error(name: &str, expected: &[u64], found: &[u64]) -> ModelError {
    ModelError::TensorShape { tensor: name.to_owned(), expected: expected.to_vec(), found: found.to_vec() }
}

/// Rotation of `dims` elements without any scaling.
pub(super) fn rope_plain(pairs: RopePairs, dims: usize, base: f64) -> Rope {
    Rope { pairs, inv_freq: inv_freq(dims, base).map(|freq| freq as f32).collect(), magnitude: 1.0 }
}

fn inv_freq(dims: usize, base: f64) -> impl Iterator<Item = f64> {
    (0..dims / 2).map(move |i| base.powf(-2.0 * i as f64 / dims as f64))
}
