//! The UDP port at which nodes come in.
use super::Driver;
use super::attendant::{self, Gate, Refusals};
use crate::cluster::Cluster;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use weir_transport::{Crowd, EndpointError, Listener, RefusalCode, WebCertificate};

/// Links whose other end hasn't proved itself yet, at most.
const STRANGERS_MAX: usize = 256;
/// And of one address, so that nobody keeps all others out.
const STRANGERS_EACH_MAX: usize = 128;

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
            let refusals = Refusals::default();
            while let Some((link, from)) = accepting.accept().await {
                let Some(own_place) = crowd.enter(from.ip()) else {
                    let reason = "too many links from this address wait to introduce themselves";
                    attendant::log(&refusals, from, RefusalCode::Full, reason);
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
