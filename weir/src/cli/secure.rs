//! By what certificate `weir serve` is known.
use crate::authority::Authority;
use crate::config::Config;
use crate::gateway::TlsConfig;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Flags about TLS; each has its like in the configuration.
#[derive(clap::Args)]
pub(super) struct Secure {
    /// The gateway's own certificate, with those above it (PEM) [default: one of a local authority, see `weir trust`]
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Plain HTTP even off loopback: only where something in front does TLS
    #[arg(long)]
    insecure_http: bool,
}

impl Secure {
    /// Whether plain HTTP was asked for.
    pub(super) fn is_insecure(&self, config: &Config) -> bool {
        self.insecure_http || config.insecure_http
    }

    /// The certificate for a gateway at `http`; none where it needs none. The local authority is in `folder`.
    pub(super) fn tls(
        &self,
        config: &Config,
        http: SocketAddr,
        folder: impl FnOnce() -> anyhow::Result<PathBuf>,
    ) -> anyhow::Result<Option<TlsConfig>> {
        let files = self.tls_cert.as_ref().zip(self.tls_key.as_ref());
        let files = files.or(config.tls_cert.as_ref().zip(config.tls_key.as_ref()));
        if let Some((certificate, key)) = files {
            return Ok(Some(TlsConfig::from_files(certificate, key)?));
        }
        if http.ip().is_loopback() || self.is_insecure(config) {
            return Ok(None);
        }
        Ok(Some(local(config, http, &folder()?)?))
    }
}

/// A certificate of the local authority, for the names and addresses by which this machine may be called.
fn local(config: &Config, http: SocketAddr, folder: &Path) -> anyhow::Result<TlsConfig> {
    let now = SystemTime::now();
    let authority = Authority::open(folder, &host_name(), now)?;
    let names: Vec<String> = own_names().chain(config.allowed_hosts.iter().cloned()).collect();
    let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let addresses: Vec<IpAddr> = loopback.into_iter().chain(own_addresses(http.ip())).collect();
    let (chain, key) = authority.vouch(&names, &addresses, now)?;
    Ok(TlsConfig::new(chain, key)?)
}

/// This machine's name, without its domain.
pub(super) fn host_name() -> String {
    let whole = gethostname::gethostname().to_string_lossy().to_ascii_lowercase();
    whole.split('.').next().unwrap_or_default().to_owned()
}

/// What this machine may be called in its network.
pub(super) fn own_names() -> impl Iterator<Item = String> {
    let host = host_name();
    let local = format!("{host}.local");
    ["localhost".to_owned(), local, host].into_iter()
}

/// How other machines reach this one. Listening everywhere, it is the address by which packets leave.
pub(super) fn own_addresses(listening: IpAddr) -> Vec<IpAddr> {
    if !listening.is_unspecified() {
        return vec![listening];
    }
    // Nothing is sent: connecting a UDP socket only picks a route. The addresses are reserved for documentation.
    let routes = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    let outward = |(from, to): (&str, &str)| {
        let socket = UdpSocket::bind(from).ok()?;
        socket.connect(to).ok()?;
        let ip = socket.local_addr().ok()?.ip();
        (!ip.is_unspecified()).then_some(ip)
    };
    let found: Vec<IpAddr> =
        routes.into_iter().take(if listening.is_ipv4() { 1 } else { 2 }).filter_map(outward).collect();
    if found.is_empty() { vec![Ipv4Addr::LOCALHOST.into()] } else { found }
}
