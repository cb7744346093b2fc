//! What a model computes, as a list of fused steps with shapes: the only thing a device knows of a model.
//!
//! The residual stream `x` has `hidden` values a row. Steps that read it (`NormQkvRopeCache`, `NormGateUpAct`,
//! `NormLogits`) see all residual sums of the steps before them; [`Step::Out`] and [`Step::Down`] add to it after
//! an optional norm of their own. A family with attention and MLP in parallel just lists
//! `NormQkvRopeCache, Attend, NormGateUpAct, Out, Down`: nothing has been added when the MLP reads.

/// A tensor of the model file by its name.
pub type TensorName = String;

/// The whole of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and of the output head.
    pub vocab: usize,
    /// Longest context that the model was trained for, in tokens.
    pub context: usize,
    /// Token ids to rows of the residual stream.
    pub embed: Embed,
    /// One entry a layer.
    pub layers: Vec<Vec<Step>>,
    /// The residual stream to logits.
    pub head: Head,
}

/// `x = scale * table[id]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Embed {
    /// `[vocab, hidden]`.
    pub table: TensorName,
    /// 1 for most, sqrt(hidden) for the Gemmas.
    pub scale: f32,
}

/// `y = W x + b`, `W` being `[rows, cols]`, row-major (GGUF's `ne = [cols, rows]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// The matrix.
    pub weight: TensorName,
    /// `[rows]`.
    pub bias: Option<TensorName>,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// How a vector is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps)`.
    Rms,
    /// `(x - mean) / sqrt(var + eps)`.
    Layer,
}

/// A normalisation followed by a gain and, for some families, a bias.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// Which formula.
    pub kind: NormKind,
    /// Gain, one a column.
    pub weight: TensorName,
    /// Added after the gain.
    pub bias: Option<TensorName>,
    /// Added under the root.
    pub eps: f32,
}

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// `(2i, 2i+1)`: llama's files.
    Adjacent,
    /// `(i, i + dims/2)`: NeoX, Qwen, Gemma.
    Halves,
}

/// Rotary position embedding. The angle of pair `i` at position `p` is `p * inv_freq[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Pairing.
    pub pairs: RopePairs,
    /// Per pair, radians a position, all scaling applied; `2 * inv_freq.len()` leading elements of a head rotate.
    pub inv_freq: Vec<f32>,
    /// Multiplies sine and cosine (YaRN); 1 for most.
    pub magnitude: f32,
}

/// The gate's non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// Heads of an attention layer. Query head `h` reads key/value head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values in a head; a multiple of 32.
    pub head_dim: usize,
}

/// Norm, the three products, optional per-head norms of q and k, rotation, and the write to the KV cache.
#[derive(Clone, Debug, PartialEq)]
pub struct NormQkvRopeCache {
    /// Before the products.
    pub norm: Norm,
    /// `[heads * head_dim, hidden]`.
    pub q: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub k: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub v: Linear,
    /// Shape.
    pub heads: Heads,
    /// Of each query head, before rotation; weight is `[head_dim]`.
    pub q_norm: Option<Norm>,
    /// Of each key head, before rotation.
    pub k_norm: Option<Norm>,
    /// Rotation.
    pub rope: Rope,
}

/// Causal attention over the KV cache: `softmax(scale * q k^T) v`.
#[derive(Clone, Debug, PartialEq)]
pub struct Attend {
    /// Shape.
    pub heads: Heads,
    /// Multiplies scores.
    pub scale: f32,
    /// A query at `p` sees keys at `p - window + 1 ..= p`; none is all of the past.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

/// `x += norm(W y)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// Back to `hidden`.
    pub linear: Linear,
    /// Of the product, before the sum.
    pub post_norm: Option<Norm>,
}

/// `act(gate(norm x)) * up(norm x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct NormGateUpAct {
    /// Before the products.
    pub norm: Norm,
    /// `[ff, hidden]`; none for an MLP without a gate: `act(up(norm x))`.
    pub gate: Option<Linear>,
    /// `[ff, hidden]`.
    pub up: Linear,
    /// The gate's.
    pub act: Activation,
}

/// One fused step.
#[expect(
    clippy::large_enum_variant,
    reason = "a plan has a few hundred steps; boxes would clutter every family"
)]
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Reads the residual stream, writes queries and the KV cache.
    NormQkvRopeCache(NormQkvRopeCache),
    /// Reads queries and the KV cache.
    Attend(Attend),
    /// Adds the attention's output to the residual stream.
    Out(Residual),
    /// Reads the residual stream.
    NormGateUpAct(NormGateUpAct),
    /// Adds the MLP's output to the residual stream.
    Down(Residual),
}

/// Norm and the product with the output matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// The last norm.
    pub norm: Norm,
    /// `[vocab, hidden]`; the embedding's table where they are tied.
    pub linear: Linear,
    /// Logits become `cap * tanh(logit / cap)`.
    pub soft_cap: Option<f32>,
}

impl Plan {
    /// Bytes of KV cache that one token takes in `layers` of this plan.
    pub fn kv_bytes_per_token(&self, layers: std::ops::Range<usize>, kv: weir_scheduler::KvType) -> usize {
        let values: usize = self.layers[layers]
            .iter()
            .flatten()
            .map(|step| match step {
                Step::Attend(a) => 2 * a.heads.kv_heads * a.heads.head_dim,
                _ => 0,
            })
            .sum();
        match kv {
            weir_scheduler::KvType::F16 => values * 2,
            weir_scheduler::KvType::Q8_0 => values / 32 * 34,
        }
    }
}
