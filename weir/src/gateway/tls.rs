//! TLS of the gateway's own.
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use weir_transport::Fingerprint;

/// By what certificate the gateway is known.
#[derive(Clone, Debug)]
pub struct TlsConfig {
    pub(super) config: Arc<rustls::ServerConfig>,
    key: Fingerprint,
}

/// Why a certificate can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read, or is not what it should be.
    #[error("{}: {why}; certificates and keys are read in PEM", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// They don't go together, or the key's kind is not known.
    #[error("the certificate and its key can't be used: {0}")]
    Unusable(String),
}

impl TlsConfig {
    /// A certificate, with those above it, and its key.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<TlsConfig, TlsError> {
        let unusable = |why: rustls::Error| TlsError::Unusable(why.to_string());
        let known = chain.first().and_then(Fingerprint::of_certificate);
        let known = known.ok_or_else(|| TlsError::Unusable("it is no certificate".into()))?;
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let mut config = config
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(unusable)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsConfig { config: Arc::new(config), key: known })
    }

    /// From files in PEM.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<TlsConfig, TlsError> {
        let failed = |path: &Path, why: rustls::pki_types::pem::Error| TlsError::File {
            path: path.to_owned(),
            why: why.to_string(),
        };
        let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
        let key_of = PrivateKeyDer::from_pem_file(key);
        TlsConfig::new(chain.map_err(|e| failed(certificate, e))?, key_of.map_err(|e| failed(key, e))?)
    }

    /// The key of the certificate.
    pub fn key(&self) -> Fingerprint {
        self.key
    }
}
