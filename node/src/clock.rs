//! Time, here and in a browser.
#[cfg(target_arch = "wasm32")]
pub(crate) use page::{Instant, interval, timeout};
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use std::time::Instant;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use tokio::time::timeout;

/// Ticks at once, and then so often; late ticks aren't made up for.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn interval(every: std::time::Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(every);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}

#[cfg(target_arch = "wasm32")]
mod page {
    use js_sys::{Function, Promise};
    use std::future::Future;
    use std::time::Duration;
    use wasm_bindgen::prelude::*;
    use wasm_bindgen_futures::JsFuture;
    pub(crate) use web_time::Instant;

    #[wasm_bindgen]
    extern "C" {
        #[wasm_bindgen(js_name = setTimeout)]
        fn set_timeout(call: &Function, ms: f64) -> JsValue;
    }

    async fn sleep(time: Duration) {
        let promise = Promise::new(&mut |resolve, _| _ = set_timeout(&resolve, time.as_secs_f64() * 1e3));
        // It can't be refused.
        _ = JsFuture::from(promise).await;
    }

    /// It took too long.
    pub(crate) struct Elapsed;

    pub(crate) async fn timeout<T>(most: Duration, work: impl Future<Output = T>) -> Result<T, Elapsed> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = sleep(most) => Err(Elapsed),
        }
    }

    pub(crate) struct Interval {
        every: Duration,
        next: Instant,
    }

    pub(crate) fn interval(every: Duration) -> Interval {
        Interval { every, next: Instant::now() }
    }

    impl Interval {
        pub(crate) async fn tick(&mut self) {
            let left = self.next.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                sleep(left).await;
            }
            self.next = Instant::now() + self.every;
        }
    }
}
