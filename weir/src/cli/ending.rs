//! How commands that run until they are stopped hear of it.

/// How we were asked to stop.
pub(super) enum Asked {
    Interrupt,
    Terminate,
}

/// Waits for Ctrl-C, or for the system to say so.
pub(super) async fn asked_to_stop() -> Asked {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            return tokio::select! {
                _ = terminate.recv() => Asked::Terminate,
                _ = tokio::signal::ctrl_c() => Asked::Interrupt,
            };
        }
    }
    let _ = tokio::signal::ctrl_c().await;
    Asked::Interrupt
}
