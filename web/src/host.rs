//! What JavaScript does for us.
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;
use weir_scheduler::Time;

#[wasm_bindgen]
extern "C" {
    /// The worker that we run in.
    pub type Host;
    /// A promise that is kept after the worker has looked at its messages.
    #[wasm_bindgen(method, js_name = breathe)]
    fn breathe_js(this: &Host) -> js_sys::Promise;

    /// Part of a model: something with a size that can be read at once.
    pub type Part;
    #[wasm_bindgen(method, getter)]
    pub fn size(this: &Part) -> f64;
    #[wasm_bindgen(method, catch)]
    pub fn read(this: &Part, offset: f64, into: &mut [u8]) -> Result<f64, JsValue>;

    #[wasm_bindgen(js_namespace = performance)]
    fn now() -> f64;
    #[wasm_bindgen(js_name = setTimeout)]
    fn set_timeout(call: &js_sys::Function, ms: f64) -> JsValue;
    /// To the console.
    #[wasm_bindgen(js_namespace = console)]
    pub fn error(text: &str);
}

impl Host {
    /// Lets the worker look at its messages.
    pub async fn breathe(&self) {
        // It can't be refused.
        _ = JsFuture::from(self.breathe_js()).await;
    }
}

/// Waits.
pub async fn pause(ms: f64) {
    // It can't be refused.
    _ = JsFuture::from(js_sys::Promise::new(&mut |resolve, _| _ = set_timeout(&resolve, ms))).await;
}

/// Since the worker began.
pub fn time() -> Time {
    Time::ZERO + std::time::Duration::from_secs_f64(now().max(0.0) / 1e3)
}
