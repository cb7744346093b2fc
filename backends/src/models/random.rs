//! Models of any shape with random weights: for tests and benches.
use super::Shape;
use crate::gguf::write::{Declared, Writer};
use crate::gguf::{GgmlType, ModelFile};
use crate::plan::Heads;
use crate::quant;
use half::f16;
use std::io::{self, Write};

/// What to make up. Equal values give equal files.
#[derive(Clone, Debug, PartialEq)]
pub struct Random {
    /// Name of one of [`super::FAMILIES`].
    pub architecture: &'static str,
    /// Sizes.
    pub shape: Shape,
    /// How matrices are stored; the width of each must fill its blocks.
    pub matrices: GgmlType,
    /// How values and the MLP's last matrix are stored in layers where files whose type ends in `_M` spend more bits.
    pub better: Option<GgmlType>,
    /// How the embedding is stored, and the output matrix, if there is one.
    pub embedding: GgmlType,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
    /// Of the weights.
    pub seed: u64,
}

impl Random {
    /// A model of some 100,000 weights that still has two layers, grouped heads and a head size of its own.
    pub fn tiny(architecture: &'static str, seed: u64) -> Random {
        Random {
            architecture,
            shape: Shape {
                layers: 2,
                hidden: 64,
                ff: 160,
                vocab: 320,
                context: 512,
                heads: Heads { heads: 4, kv_heads: 2, head_dim: 32 },
                eps: 1e-5,
            },
            matrices: GgmlType::Q8_0,
            better: None,
            embedding: GgmlType::F16,
            tied: false,
            seed,
        }
    }

    /// The header. More metadata may be set before it is written with [`Random::weights`].
    pub fn writer(&self) -> Writer {
        let Shape { layers, hidden, ff, vocab, context, heads, eps } = self.shape;
        let mut writer = Writer::new(self.architecture);
        let mut set = |name: &str, size: usize| {
            writer.set(&format!("{}.{name}", self.architecture), size as u32);
        };
        set("block_count", layers);
        set("embedding_length", hidden);
        set("feed_forward_length", ff);
        set("context_length", context);
        set("attention.head_count", heads.heads);
        set("attention.head_count_kv", heads.kv_heads);
        set("attention.key_length", heads.head_dim);
        set("attention.value_length", heads.head_dim);
        set("rope.dimension_count", heads.head_dim);
        if self.architecture == "gemma3" {
            set("attention.sliding_window", (context / 16).max(1));
        }
        writer.set(&format!("{}.attention.layer_norm_rms_epsilon", self.architecture), eps);
        let matrix = |cols: usize, rows: usize| [cols as u64, rows as u64];
        writer.declare("token_embd.weight", self.embedding, &matrix(hidden, vocab));
        writer.declare("output_norm.weight", GgmlType::F32, &[hidden as u64]);
        if !self.tied {
            writer.declare("output.weight", self.embedding, &matrix(hidden, vocab));
        }
        (0..layers).for_each(|i| self.declare_layer(&mut writer, i));
        writer
    }

    fn declare_layer(&self, writer: &mut Writer, layer: usize) {
        let Shape { hidden, ff, heads: Heads { heads, kv_heads, head_dim }, .. } = self.shape;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let mut vector = |name: &str, width: usize| {
            writer.declare(&format!("blk.{layer}.{name}"), GgmlType::F32, &[width as u64]);
        };
        vector("attn_norm.weight", hidden);
        vector("ffn_norm.weight", hidden);
        if self.architecture == "qwen2" {
            for (name, width) in [("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)] {
                vector(name, width);
            }
        }
        if matches!(self.architecture, "qwen3" | "gemma3") {
            vector("attn_q_norm.weight", head_dim);
            vector("attn_k_norm.weight", head_dim);
        }
        if self.architecture == "gemma3" {
            vector("post_attention_norm.weight", hidden);
            vector("post_ffw_norm.weight", hidden);
        }
        let layers = self.shape.layers;
        let important = layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
        let better = self.better.filter(|_| important).unwrap_or(self.matrices);
        let mut matrix = |name: &str, cols: usize, rows: usize| {
            let ty = if matches!(name, "attn_v" | "ffn_down") { better } else { self.matrices };
            let name = format!("blk.{layer}.{name}.weight");
            writer.declare(&name, ty, &[cols as u64, rows as u64]);
        };
        matrix("attn_q", hidden, q);
        matrix("attn_k", hidden, kv);
        matrix("attn_v", hidden, kv);
        matrix("attn_output", q, hidden);
        matrix("ffn_gate", hidden, ff);
        matrix("ffn_up", hidden, ff);
        matrix("ffn_down", ff, hidden);
    }

    /// Bytes of one tensor, from the seed and its name: norms near 1, biases and matrices near 0 and such that a
    /// product is as large as its input. Made a block at a time, so that types that are hard to quantise to have
    /// random bits and a fitting scale.
    pub fn weights(&self, tensor: &Declared) -> Vec<u8> {
        let mut noise =
            Noise(tensor.name.bytes().fold(self.seed, |seed, byte| Noise(seed ^ u64::from(byte)).next()));
        let (centre, spread) = match tensor.name.as_str() {
            name if name.ends_with("norm.weight") => (1.0, 0.2),
            "rope_freqs.weight" => (4.0, 1.0),
            name if name.ends_with(".bias") => (0.0, 0.1),
            "token_embd.weight" => (0.0, 1.0),
            _ => (0.0, 1.0 / (tensor.dims[0] as f32).sqrt()),
        };
        let mut block = vec![0.0; tensor.ty.block_values()];
        let mut out = Vec::with_capacity(tensor.bytes as usize);
        while (out.len() as u64) < tensor.bytes {
            block.iter_mut().for_each(|x| *x = centre + spread * noise.value());
            match quant::quantize(tensor.ty, &block) {
                Some(bytes) => out.extend(bytes),
                None => out.extend(noise.block(tensor.ty, spread)),
            }
        }
        out
    }

    /// Writes the file.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.writer().write(out, |tensor| self.weights(tensor))
    }

    /// The file in memory, opened.
    ///
    /// # Panics
    /// If the writer and the reader disagree.
    pub fn file(&self) -> ModelFile {
        let bytes = self.writer().to_bytes(|tensor| self.weights(tensor));
        ModelFile::from_bytes(bytes).expect("the writer's files can be read")
    }
}

/// Steele, Lea and Flood's SplitMix64.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform with variance 1.
    fn value(&mut self) -> f32 {
        ((self.next() >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0) * 3f32.sqrt()
    }

    /// A block of random bits whose values have about that spread.
    fn block(&mut self, ty: GgmlType, spread: f32) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..ty.block_bytes()).map(|_| self.next() as u8).collect();
        // Where the scale and the minimum are, and the root mean square of values whose scale is 1.
        let (scale_at, minimum_at, size) = match ty {
            GgmlType::Q2_K => (80, Some(82), 13.9),
            GgmlType::Q3_K => (108, None, 43.0),
            GgmlType::Q4_K => (0, Some(2), 260.0),
            GgmlType::Q5_K => (0, Some(2), 520.0),
            GgmlType::Q6_K => (208, None, 1365.0),
            GgmlType::Q5_1 => (0, Some(2), 10.0),
            GgmlType::IQ4_NL => (0, None, 71.0),
            GgmlType::IQ4_XS => (0, None, 1310.0),
            _ => unreachable!("{ty} is quantised to"),
        };
        let scale = spread / size;
        bytes[scale_at..scale_at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        if let Some(at) = minimum_at {
            // Halfway between the quants' ends; Q5_1 alone adds its minimum, and has no scale of it.
            let minimum = match ty {
                GgmlType::Q2_K => scale * 1.5,
                GgmlType::Q4_K => scale * 7.5,
                GgmlType::Q5_K => scale * 15.5,
                _ => scale * -15.5,
            };
            bytes[at..at + 2].copy_from_slice(&f16::from_f32(minimum).to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_spread_asked_for() {
        for ty in GgmlType::KNOWN {
            let tensor = Declared {
                name: "blk.0.attn_q.weight".into(),
                ty,
                dims: vec![1024, 64],
                bytes: ty.bytes_of(1024 * 64).unwrap(),
            };
            let mut values = vec![0.0; 1024 * 64];
            quant::dequantize(ty, &Random::tiny("llama", 1).weights(&tensor), &mut values);
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let spread = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
            let expected = 1.0 / 32.0;
            assert!((0.8..1.25).contains(&(spread / expected)), "{ty}: {spread}");
            assert!(mean.abs() < 0.1 * expected, "{ty}: {mean}");
        }
    }
}
