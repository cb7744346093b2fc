//! Models of the usual shapes with random weights: speed doesn't depend on the values.
use std::collections::HashMap;
use weir_backends::gguf::{GgmlType, GgufError, ModelFile};
use weir_backends::models::Shape;
use weir_backends::models::random::Random;
use weir_backends::plan::Heads;

/// The model of a name like `1b-q8_0` (135m, 0.6b, 1b or 8b, and q4_0, q4_1, q8_0, q4_k_m or bf16), in memory; none for
/// another name.
pub fn model(name: &str) -> Option<Result<ModelFile, GgufError>> {
    bytes(name).map(ModelFile::from_bytes)
}

/// The bytes of such a model's file.
pub fn bytes(name: &str) -> Option<Vec<u8>> {
    let (size, ty) = name.split_once('-')?;
    let (architecture, shape, tied) = shape(size)?;
    let (matrices, better, embedding) = match ty {
        "q4_0" => (GgmlType::Q4_0, None, GgmlType::Q8_0),
        "q4_1" => (GgmlType::Q4_1, None, GgmlType::Q8_0),
        "q8_0" => (GgmlType::Q8_0, None, GgmlType::Q8_0),
        "q4_k_m" => (GgmlType::Q4_K, Some(GgmlType::Q6_K), GgmlType::Q6_K),
        "bf16" => (GgmlType::BF16, None, GgmlType::BF16),
        _ => return None,
    };
    let random = Random { architecture, shape, matrices, better, embedding, tied, seed: 1 };
    // A few rows of each kind, again and again.
    let mut pools: HashMap<(GgmlType, u64, bool), Vec<u8>> = HashMap::new();
    let bytes = random.writer().to_bytes(|tensor| {
        let kind = (tensor.ty, tensor.dims[0], tensor.name.ends_with("norm.weight"));
        let pool = pools.entry(kind).or_insert_with(|| {
            let mut small = tensor.clone();
            if let [cols, rows] = tensor.dims[..] {
                small.dims = vec![cols, rows.min(256)];
                small.bytes = tensor.bytes / rows * rows.min(256);
            }
            random.weights(&small)
        });
        let wanted = tensor.bytes as usize;
        let mut bytes = Vec::with_capacity(wanted);
        while bytes.len() < wanted {
            bytes.extend_from_slice(&pool[..pool.len().min(wanted - bytes.len())]);
        }
        bytes
    });
    Some(bytes)
}

/// Architecture, sizes, and whether the output matrix is the embedding: those of SmolLM2-135M, Qwen3-0.6B,
/// Llama-3.2-1B and Llama-3.1-8B.
fn shape(size: &str) -> Option<(&'static str, Shape, bool)> {
    let make = |layers, hidden, ff, (heads, kv_heads, head_dim), vocab| Shape {
        layers,
        hidden,
        ff,
        vocab,
        context: 8192,
        heads: Heads { heads, kv_heads, head_dim },
        eps: 1e-5,
    };
    Some(match size {
        "135m" => ("llama", make(30, 576, 1536, (9, 3, 64), 49_152), true),
        "0.6b" => ("qwen3", make(28, 1024, 3072, (16, 8, 128), 151_936), true),
        "1b" => ("llama", make(16, 2048, 8192, (32, 8, 64), 128_256), true),
        "8b" => ("llama", make(32, 4096, 14_336, (32, 8, 128), 128_256), false),
        _ => return None,
    })
}
