//! Logits against those that llama.cpp computes from an F32 copy of the same file.
pub mod device;
pub mod logits;
use logits::{Golden, Row, TOP};
use std::path::PathBuf;

pub fn read(model: &str) -> Golden {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{model}.logits"));
    Golden::from_bytes(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_committed_files_are_whole() {
    for (model, positions) in [("smollm2", 512), ("qwen2", 512), ("gemma3", 1536)] {
        let golden = read(model);
        assert_eq!((golden.tokens.len(), golden.rows.len()), (positions, positions), "{model}");
        assert!(
            golden.peer_kl > 1e-4 && golden.peer_kl <= golden.peer_kl_whole && golden.peer_kl_whole < 1e-2
        );
        for row in &golden.rows {
            let mass = row.top.iter().map(|(_, p)| p.exp()).sum::<f64>() + row.tail.exp();
            assert!((mass - 1.0).abs() < 2e-5, "{model}: a row has a mass of {mass}");
            assert!(row.top.is_sorted_by(|a, b| a.1 >= b.1));
        }
        assert!(Golden::from_bytes(&golden.to_bytes()).unwrap() == golden);
    }
}

#[test]
fn a_row_knows_its_own_logits() {
    let logits: Vec<f32> =
        (0..1000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 16) as f32 / 8000.0).collect();
    let row = Row::of(&logits);
    assert_eq!(row.top.len(), TOP);
    assert!(row.kl(&logits).abs() < 1e-12);
    let shifted: Vec<f32> = logits.iter().map(|x| x + 3.0).collect();
    assert!(row.kl(&shifted).abs() < 1e-7);
    let flatter: Vec<f32> = logits.iter().map(|x| x * 0.9).collect();
    assert!(row.kl(&flatter) > 1e-3);
}

#[test]
fn a_damaged_file_is_refused() {
    let bytes = read("smollm2").to_bytes();
    for length in (0..bytes.len()).step_by(997) {
        assert!(Golden::from_bytes(&bytes[..length]).is_err());
    }
}
