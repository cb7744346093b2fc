//! A certificate authority of this machine's own, for a gateway for which nobody else vouches.
//!
//! It can vouch for private addresses and for names that only exist in private networks, and for nothing else, so that
//! trusting it costs little: whoever steals its key can't pretend to be a bank.
use crate::private;
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long the authority lasts.
const AUTHORITY_DAYS: u32 = 3650;
/// How long a certificate of it lasts. One is made at every start; browsers take none that is valid for longer.
const CERTIFICATE_DAYS: u32 = 397;
/// Domains that don't exist in public, so that no certificate for them does harm elsewhere.
const DOMAINS: [&str; 5] = ["localhost", "local", "lan", "internal", "home.arpa"];
/// Private addresses: RFC 1918, loopback, link-local, carrier-grade and overlay networks, and their like in IPv6.
const NETWORKS: [(&str, u8); 9] = [
    ("127.0.0.0", 8),
    ("10.0.0.0", 8),
    ("172.16.0.0", 12),
    ("192.168.0.0", 16),
    ("169.254.0.0", 16),
    ("100.64.0.0", 10),
    ("::1", 128),
    ("fc00::", 7),
    ("fe80::", 10),
];

/// The authority whose key is in a folder for state.
pub struct Authority {
    params: CertificateParams,
    key: KeyPair,
    certificate: CertificateDer<'static>,
    host: String,
}

/// What is kept of it.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// PKCS#8, in PEM.
    key: String,
    /// What the authority is called; its certificates must say it in the same way.
    name: String,
    /// The machine whose own name it may vouch for.
    host: String,
}

/// Why there is no authority, or no certificate of it.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file.
    #[error("{}: {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Nothing is left that it may vouch for.
    #[error(
        "the local authority vouches for private addresses only; name your own certificate with --tls-cert and --tls-key"
    )]
    Nothing,
    /// The key makes no certificate; a bug.
    #[error("no certificate can be made: {0}")]
    Certificate(#[from] rcgen::Error),
}

impl Authority {
    /// Its certificate, in PEM, in the folder for state: what others are to trust.
    pub fn file(folder: &Path) -> PathBuf {
        folder.join("authority.pem")
    }

    /// The authority of the machine called `host`, whose key is in `folder`; a new one if there is none.
    pub fn open(folder: &Path, host: &str, now: SystemTime) -> Result<Authority, AuthorityError> {
        let path = folder.join("authority.json");
        let failed = |path: &Path, why: String| AuthorityError::File { path: path.to_owned(), why };
        private::create_folder(folder).map_err(|e| failed(folder, e.to_string()))?;
        let kept: Kept = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| failed(&path, e.to_string()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Authority::found(folder, &path, host, now);
            }
            Err(error) => return Err(failed(&path, error.to_string())),
        };
        let key = KeyPair::from_pem(&kept.key)?;
        let public = Authority::file(folder);
        let certificate =
            CertificateDer::from_pem_file(&public).map_err(|e| failed(&public, e.to_string()))?;
        Ok(Authority { params: params(&kept.name, &kept.host, now), key, certificate, host: kept.host })
    }

    fn found(folder: &Path, path: &Path, host: &str, now: SystemTime) -> Result<Authority, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let digest = blake3::hash(key.public_key_raw()).to_hex();
        let kept = Kept {
            key: key.serialize_pem(),
            name: format!("Weir on {host} ({})", &digest[..8]),
            host: host.to_owned(),
        };
        let params = params(&kept.name, host, now);
        let certificate = params.self_signed(&key)?;
        let public = Authority::file(folder);
        let failed = |path: &Path, e: std::io::Error| AuthorityError::File {
            path: path.to_owned(),
            why: e.to_string(),
        };
        std::fs::write(&public, certificate.pem()).map_err(|e| failed(&public, e))?;
        let json = serde_json::to_vec(&kept).expect("strings always serialise");
        private::write_file(path, &json).map_err(|e| failed(path, e))?;
        Ok(Authority { params, key, certificate: certificate.der().clone(), host: kept.host })
    }

    /// A certificate for those of the names and addresses that it may vouch for, with its key.
    pub fn vouch(
        &self,
        names: &[String],
        addresses: &[IpAddr],
        now: SystemTime,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), AuthorityError> {
        let names = names.iter().filter(|name| self.may_vouch_for(name));
        let names = names.filter_map(|name| Some(SanType::DnsName(name.as_str().try_into().ok()?)));
        let addresses = addresses.iter().filter(|address| is_private(**address));
        let all: Vec<SanType> = names.chain(addresses.map(|a| SanType::IpAddress(*a))).collect();
        if all.is_empty() {
            return Err(AuthorityError::Nothing);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Weir");
        params.subject_alt_names = all;
        params.not_before = (now - DAY).into();
        params.not_after = (now + DAY * (CERTIFICATE_DAYS - 1)).into();
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let issuer = Issuer::from_params(&self.params, &self.key);
        let certificate = params.signed_by(&key, &issuer)?;
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok((vec![certificate.der().clone(), self.certificate.clone()], key))
    }

    fn may_vouch_for(&self, name: &str) -> bool {
        let within = |domain: &str| {
            name == domain || name.strip_suffix(domain).is_some_and(|front| front.ends_with('.'))
        };
        within(&self.host) || DOMAINS.into_iter().any(within)
    }
}

fn params(name: &str, host: &str, now: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - DAY).into();
    params.not_after = (now + DAY * AUTHORITY_DAYS).into();
    let names = DOMAINS.into_iter().chain([host]).map(|name| GeneralSubtree::DnsName(name.to_owned()));
    let networks = networks().map(|(address, bits)| CidrSubnet::from_addr_prefix(address, bits));
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: names.chain(networks.map(GeneralSubtree::IpAddress)).collect(),
        excluded_subtrees: Vec::new(),
    });
    params
}

fn networks() -> impl Iterator<Item = (IpAddr, u8)> {
    NETWORKS.into_iter().map(|(address, bits)| (address.parse().expect("they are addresses"), bits))
}

fn is_private(address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 4),
        IpAddr::V6(v6) => (u128::from(v6), 6),
    };
    let (number, family) = bits(address);
    networks().any(|(network, length)| {
        let (prefix, of) = bits(network);
        of == family && (number ^ prefix).leading_zeros() >= u32::from(length)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_and_vouches_for_what_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let first = Authority::open(folder.path(), "attic", now).unwrap();
        let again = Authority::open(folder.path(), "renamed", now).unwrap();
        assert_eq!(first.certificate, again.certificate);
        assert!(
            again.may_vouch_for("attic")
                && again.may_vouch_for("attic.lan")
                && !again.may_vouch_for("xattic")
        );
        for (name, good) in
            [("localhost", true), ("a.local", true), ("example.org", false), ("local.org", false)]
        {
            assert_eq!(first.may_vouch_for(name), good, "{name}");
        }
        for (address, good) in [
            ("10.1.2.3", true),
            ("172.31.0.1", true),
            ("172.32.0.1", false),
            ("8.8.8.8", false),
            ("::1", true),
            ("::2", false),
            ("fd12::1", true),
            ("2001:db8::1", false),
        ] {
            assert_eq!(is_private(address.parse().unwrap()), good, "{address}");
        }
        let names = ["attic".to_owned(), "bank.example".to_owned()];
        assert!(first.vouch(&names, &["127.0.0.1".parse().unwrap()], now).is_ok());
        assert!(matches!(first.vouch(&names[1..], &[], now), Err(AuthorityError::Nothing)));
    }
}
