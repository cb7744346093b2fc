//! What a long-running command tells of itself while it runs: `/metrics` on its own address, and what goes to a collector.
use crate::config::Config;
use crate::telemetry::{Listener, Scrape, Telemetry};
use anyhow::Context;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};

/// For what is still in the queue when the process ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// Tells until it is dropped.
pub(super) struct Telling {
    telemetry: Telemetry,
    scrape: Scrape,
    _listener: Option<Listener>,
    sends: Option<AbortHandle>,
}

impl Telling {
    /// `asked` is an address from the command line.
    pub(super) async fn start(
        config: &Config,
        asked: Option<SocketAddr>,
        telemetry: Telemetry,
        scrape: Scrape,
    ) -> anyhow::Result<Telling> {
        let listener = match asked.or(config.metrics) {
            None => None,
            Some(at) => {
                let opened = Listener::open(at, scrape.clone()).await;
                let listener = opened.with_context(|| format!("can't tell metrics at {at}"))?;
                tracing::info!("metrics at http://{}/metrics", listener.address);
                Some(listener)
            }
        };
        let sends = telemetry.metrics_every().map(|every| {
            let (telemetry, scrape) = (telemetry.clone(), scrape.clone());
            let send = async move {
                let mut ticks = interval(every);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    telemetry.send_metrics(scrape().await);
                }
            };
            tokio::spawn(send).abort_handle()
        });
        Ok(Telling { telemetry, scrape, _listener: listener, sends })
    }

    /// Sends what has not been sent yet, while there is something to tell of.
    pub(super) async fn end(self) {
        if self.telemetry.metrics_every().is_some() {
            self.telemetry.send_metrics((self.scrape)().await);
        }
        let telemetry = self.telemetry.clone();
        // It waits on a thread where that holds nobody up.
        _ = tokio::task::spawn_blocking(move || telemetry.flush(FAREWELL)).await;
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        if let Some(sends) = &self.sends {
            sends.abort();
        }
    }
}
