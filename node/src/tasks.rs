//! What runs beside other things, here and in a browser.
use std::future::Future;

/// Pieces of work under way; dropping it ends them.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) struct Tasks<T>(tokio::task::JoinSet<T>);

#[cfg(not(target_arch = "wasm32"))]
impl<T: Send + 'static> Tasks<T> {
    pub fn new() -> Self {
        Tasks(tokio::task::JoinSet::new())
    }

    pub fn spawn(&mut self, work: impl Future<Output = T> + Send + 'static) {
        self.0.spawn(work);
    }

    /// What came of one of them; waits forever where there are none. Dropping the future loses nothing.
    pub async fn next(&mut self) -> T {
        loop {
            match self.0.join_next().await {
                Some(Ok(done)) => return done,
                Some(Err(error)) if error.is_panic() => tracing::error!("a task panicked: {error}"),
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }
}

/// Does what takes long beside everything else.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn beside(work: impl FnOnce() + Send + 'static) {
    tokio::task::spawn_blocking(work);
}

/// Goes on by itself.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn go(work: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(work);
}

/// Pieces of work under way, which advance while [`Tasks::next`] is waited for; dropping it ends them.
#[cfg(target_arch = "wasm32")]
pub(crate) struct Tasks<T>(
    futures_util::stream::FuturesUnordered<futures_util::future::LocalBoxFuture<'static, T>>,
);

#[cfg(target_arch = "wasm32")]
impl<T: 'static> Tasks<T> {
    pub fn new() -> Self {
        Tasks(futures_util::stream::FuturesUnordered::new())
    }

    pub fn spawn(&mut self, work: impl Future<Output = T> + 'static) {
        self.0.push(Box::pin(work));
    }

    /// What came of one of them; waits forever where there are none. Dropping the future loses nothing.
    pub async fn next(&mut self) -> T {
        match futures_util::StreamExt::next(&mut self.0).await {
            Some(done) => done,
            None => std::future::pending().await,
        }
    }
}

/// Does it now: there is one thread.
#[cfg(target_arch = "wasm32")]
pub(crate) fn beside(work: impl FnOnce() + 'static) {
    work();
}

/// Goes on by itself.
#[cfg(target_arch = "wasm32")]
pub(crate) fn go(work: impl Future<Output = ()> + 'static) {
    wasm_bindgen_futures::spawn_local(work);
}
