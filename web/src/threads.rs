//! More threads: workers that share this module's memory and are lent to the processor's programs. Each makes an instance of
//! the module on the first one's memory, enlists, tells the first one so, and serves; `web/ts/helper.ts` is that worker.
use wasm_bindgen::prelude::*;
use weir_backends::cpu::lent;

/// Counts the calling worker in; it must call `serve` next.
#[wasm_bindgen]
pub fn enlist() {
    lent::enlist();
}

/// Works for programs, and doesn't return.
#[wasm_bindgen]
pub fn serve() {
    lent::serve();
}

/// The calling worker has failed: those who wait for it are told.
#[wasm_bindgen]
pub fn broke() {
    lent::broke();
}
