//! How commands hear that they are to stop.
use super::INTERRUPTED;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// How many look after Ctrl-C themselves, and when the last of them stopped doing so.
static HEEDING: Mutex<(usize, Option<Instant>)> = Mutex::new((0, None));
/// For this long after that, the same Ctrl-C may still be on its way to us.
const ECHO: Duration = Duration::from_millis(300);

/// While one of these lives, Ctrl-C is somebody's business. Otherwise it ends the program ([`end_on_interrupt`]).
pub(super) struct Heed;

impl Heed {
    pub(super) fn new() -> Heed {
        HEEDING.lock().unwrap_or_else(PoisonError::into_inner).0 += 1;
        Heed
    }
}

impl Drop for Heed {
    fn drop(&mut self) {
        let mut heeding = HEEDING.lock().unwrap_or_else(PoisonError::into_inner);
        *heeding = (heeding.0 - 1, Some(Instant::now()));
    }
}

/// From here on Ctrl-C ends the program with a word and its exit code, wherever it is, unless somebody heeds it. What
/// was being fetched is kept, and goes on from there.
pub(super) fn end_on_interrupt() {
    let wait = || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        while runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            let (heeding, stopped) = *HEEDING.lock().unwrap_or_else(PoisonError::into_inner);
            if heeding == 0 && stopped.is_none_or(|at| at.elapsed() > ECHO) {
                eprintln!("\ninterrupted");
                std::process::exit(i32::from(INTERRUPTED));
            }
        }
    };
    // without the thread the system's own way of ending remains
    _ = std::thread::Builder::new().name("weir-ctrl-c".into()).spawn(wait);
}

/// How we were asked to stop.
pub(super) enum Asked {
    Interrupt,
    Terminate,
}

/// Waits for Ctrl-C, or for the system to say so.
pub(super) async fn asked_to_stop() -> Asked {
    let _heed = Heed::new();
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
