//! Opens a file of any bytes, plans it, and reads and dequantises its tensors: no panic, no overflow, no memory that
//! the file doesn't account for.
#![no_main]
#![allow(dead_code)] // the sources are whole, and not all of them is used here

// Compiled from the sources, not through the crate: builds in seconds, and instruments nothing else.
#[path = "../../backends/src/gguf/mod.rs"]
pub mod gguf;
#[path = "../../backends/src/models/mod.rs"]
pub mod models;
#[path = "../../backends/src/plan.rs"]
pub mod plan;
#[path = "../../backends/src/quant.rs"]
pub mod quant;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = gguf::ModelFile::from_bytes(bytes) else { return };
    if let Ok(plan) = models::plan(&file) {
        assert!(plan.layers.len() <= file.tensors().len());
        assert!(file.tensor(&plan.head.linear.weight).is_some());
    }
    for tensor in file.tensors() {
        let mut stored = vec![0; tensor.bytes as usize];
        if file.read(tensor, 0..tensor.bytes, &mut stored).is_ok() {
            let mut values = vec![0.0; tensor.values() as usize];
            quant::dequantize(tensor.ty, &stored, &mut values);
        }
    }
});
