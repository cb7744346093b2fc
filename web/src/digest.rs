//! SHA-256 of files that are too large to be in memory, which is all that browsers digest by themselves.
use sha2::{Digest as _, Sha256};
use wasm_bindgen::prelude::*;

/// A digest as its bytes come.
#[wasm_bindgen]
#[derive(Default)]
pub struct Digest {
    hash: Sha256,
}

#[wasm_bindgen]
impl Digest {
    /// Of nothing yet.
    #[wasm_bindgen(constructor)]
    pub fn new() -> Digest {
        Digest::default()
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
    }

    /// In hexadecimal.
    pub fn finish(self) -> String {
        self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
