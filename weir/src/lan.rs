//! Finding the scheduler in the local network, by multicast DNS.
//!
//! What is found there is a hint and no more: anybody in the network can say anything. Who is meant is settled by the code
//! that two people, or one with two screens, compare ([`weir_transport::code`]).
use mdns_sd::{ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use weir_transport::Fingerprint;

const SERVICE: &str = "_weir._udp.local.";
/// The cluster's key, as join links have it.
const KEY: &str = "key";
/// Schedulers that are looked at, at most.
const FOUND_MAX: usize = 32;
/// For a goodbye.
const FAREWELL: Duration = Duration::from_millis(500);

/// Multicast DNS can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the local network can't be searched: {0}; join by a link (`weir link`) instead")]
pub struct LanError(#[from] mdns_sd::Error);

/// A scheduler that can be found for as long as this lives.
pub struct Announcement {
    daemon: ServiceDaemon,
    name: String,
}

/// A scheduler, as somebody in the network says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What its machine is called.
    pub name: String,
    /// `HOST:PORT`.
    pub addresses: Vec<String>,
    /// By what it is known.
    pub cluster: Fingerprint,
}

/// Says that the machine called `host` has a scheduler at this port.
pub fn announce(host: &str, at: SocketAddr, cluster: Fingerprint) -> Result<Announcement, LanError> {
    let daemon = ServiceDaemon::new()?;
    let own = format!("{host}.local.");
    let addresses: &[IpAddr] = if at.ip().is_unspecified() { &[] } else { &[at.ip()] };
    let key = cluster.to_string();
    let service = ServiceInfo::new(SERVICE, host, &own, addresses, at.port(), &[(KEY, key.as_str())][..])?;
    let service = if at.ip().is_unspecified() { service.enable_addr_auto() } else { service };
    let name = service.get_fullname().to_owned();
    daemon.register(service)?;
    Ok(Announcement { daemon, name })
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // Who isn't told forgets it by and by.
        if let Ok(done) = self.daemon.unregister(&self.name) {
            _ = done.recv_timeout(FAREWELL);
        }
        _ = self.daemon.shutdown();
    }
}

/// The schedulers that answer within that time. Blocks.
pub fn find(patience: Duration) -> Result<Vec<Found>, LanError> {
    let daemon = ServiceDaemon::new()?;
    let events = daemon.browse(SERVICE)?;
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    let end = Instant::now() + patience;
    while let Ok(event) = events.recv_timeout(end.saturating_duration_since(Instant::now())) {
        let ServiceEvent::ServiceResolved(service) = event else { continue };
        let cluster = service.get_property_val_str(KEY).and_then(|key| key.parse().ok());
        let mut addresses: Vec<String> =
            service.get_addresses().iter().filter_map(|ip| dialled(ip, service.port)).collect();
        // Version 4 first: it has no scopes.
        addresses.sort_by_key(|address| (address.starts_with('['), address.clone()));
        addresses.truncate(8);
        let name: String =
            service.host.trim_end_matches('.').chars().filter(|c| !c.is_control()).take(100).collect();
        if let Some(cluster) = cluster.filter(|_| !addresses.is_empty() && found.len() < FOUND_MAX) {
            found.insert(service.fullname.clone(), Found { name, addresses, cluster });
        }
    }
    _ = daemon.shutdown();
    Ok(found.into_values().collect())
}

/// None for addresses that mean nothing without the interface that they are of.
fn dialled(ip: &ScopedIp, port: u16) -> Option<String> {
    let ip = ip.to_ip_addr();
    let scoped = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    (!scoped && port > 0).then(|| SocketAddr::new(ip, port).to_string())
}
