//! The UDP port at which nodes come in.
use super::Driver;
use super::attendant::Gate;
use crate::cluster::Cluster;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use weir_transport::{Crowd, EndpointError, Listener, RefusalCode, WebCertificate};

/// Links whose other end hasn't proved itself yet, at most.
const STRANGERS_MAX: usize = 256;
/// And of one address, so that nobody keeps all others out.
const STRANGERS_EACH_MAX: usize = 128;
/// The same refusal of the same machine is logged once in so long.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Machines whose refusals are remembered, at most.
const REMEMBERED_MAX: usize = 1000;

/// An open port. Dropping it closes it, and the links of all nodes.
#[derive(Debug)]
pub struct Port {
    listener: Arc<Listener>,
    task: AbortHandle,
}

impl Port {
    pub(super) fn open(
        driver: Driver,
        address: SocketAddr,
        cluster: Arc<Cluster>,
    ) -> Result<Port, EndpointError> {
        let listener = Arc::new(Listener::bind(address, cluster.identity())?);
        let accepting = listener.clone();
        let task = tokio::spawn(async move {
            let room = Arc::new(Semaphore::new(STRANGERS_MAX));
            let crowd = Crowd::new(STRANGERS_EACH_MAX);
            let refusals = Arc::new(Refusals::default());
            while let Some((link, from)) = accepting.accept().await {
                let Some(own_place) = crowd.enter(from.ip()) else {
                    let reason = "too many links from this address wait to introduce themselves";
                    refusals.log(from, RefusalCode::Full, reason);
                    link.close(reason);
                    continue;
                };
                // Nobody closes it; and with no place free those who come wait in the listener, which is bounded.
                let Ok(place) = room.clone().acquire_owned().await else { break };
                let gate = Gate::Cluster {
                    cluster: cluster.clone(),
                    from,
                    _places: (place, own_place),
                    refusals: refusals.clone(),
                };
                driver.attend(link, gate);
            }
        });
        Ok(Port { listener, task: task.abort_handle() })
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.address()
    }

    /// What browsers see here, to be told to pages.
    pub fn web_certificate(&self) -> WebCertificate {
        self.listener.web_certificate()
    }

    /// Says goodbye to all nodes, and waits a moment for them to hear it.
    pub async fn close(self) {
        self.listener.close("the scheduler is shutting down").await;
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// When which refusal was logged.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<(IpAddr, RefusalCode), Instant>>);

impl Refusals {
    /// Logs a refusal, unless the same was logged lately.
    pub fn log(&self, from: SocketAddr, code: RefusalCode, message: &str) {
        let now = Instant::now();
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        logged.retain(|_, at| now.duration_since(*at) < LOG_EVERY);
        if logged.len() < REMEMBERED_MAX && logged.insert((from.ip(), code), now).is_none() {
            tracing::warn!("a node at {from} was turned away: {message}");
        }
    }
}
