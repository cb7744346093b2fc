//! Who is who: keys, proofs, and the links by which nodes join.
use crate::frames::{Proof, hex, unhex};
use crate::signed::signed_by_node;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use std::fmt;
use std::str::FromStr;

/// What [`code`] hashes begins with this.
const CODE_CONTEXT: &[u8] = b"weir/1 code";
/// What stands before the key in the SubjectPublicKeyInfo of an Ed25519 key (RFC 8410).
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// Addresses in a join link, at most.
pub const ADDRESSES_MAX: usize = 8;

/// An Ed25519 key of a node or a cluster.
pub struct Identity {
    pair: Ed25519KeyPair,
    pkcs8: Vec<u8>,
}

/// The public half of an [`Identity`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// The SHA-256 of a public key (of its SubjectPublicKeyInfo, as certificates hold it): what a join link pins.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// What lets a machine join once or a few times.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct JoinToken([u8; 16]);

/// Where a cluster is, how it is known, and what lets a machine in: `weir://HOST:PORT/FINGERPRINT/TOKEN`, with several
/// `HOST:PORT` separated by commas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinLink {
    /// `HOST:PORT`, to be tried in turn.
    pub addresses: Vec<String>,
    /// Of the cluster's key.
    pub cluster: Fingerprint,
    /// To be let in.
    pub token: JoinToken,
}

/// What is wrong with an identity, a proof or a join link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The system's randomness failed.
    #[error("the system has no randomness")]
    Random,
    /// Not an Ed25519 key in PKCS#8.
    #[error("this is no Ed25519 key in PKCS#8")]
    Key,
    /// The signature is wrong, or what is signed is another link.
    #[error("the node's proof of its key is wrong")]
    Proof,
    /// Not a join link: what is wrong with it.
    #[error("this is no join link ({0}); `weir link` on the scheduler's machine prints one")]
    Link(&'static str),
}

/// What two people compare to know that nobody is between this cluster and this node: 40 bits as eight letters and digits,
/// `K7QF-3MXA`. It depends on the link's binding, so that nobody can look for keys beforehand that give the same.
pub fn code(cluster: Fingerprint, node: &PublicKey, binding: &[u8; 32]) -> String {
    /// Without those that look like others.
    const SIGNS: &[u8; 32] = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZ";
    let hash = digest(&SHA256, &[CODE_CONTEXT, &cluster.0, &node.0, binding].concat());
    let bits = hash.as_ref().iter().take(5).fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
    let sign = |n: u32| char::from(SIGNS[(bits >> (35 - 5 * n) & 31) as usize]);
    (0..4).map(sign).chain(['-']).chain((4..8).map(sign)).collect()
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], IdentityError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| IdentityError::Random)?;
    Ok(bytes)
}

impl Identity {
    /// A new key.
    pub fn generate() -> Result<Identity, IdentityError> {
        let document =
            Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| IdentityError::Random)?;
        Identity::from_pkcs8(document.as_ref())
    }

    /// A key as [`Identity::pkcs8`] gave it.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Identity, IdentityError> {
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8).map_err(|_| IdentityError::Key)?;
        Ok(Identity { pair, pkcs8: pkcs8.to_owned() })
    }

    /// The secret key, in PKCS#8: to be kept where only its owner can read it.
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The public key.
    pub fn public(&self) -> PublicKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(key)
    }

    /// A proof that whoever has this key is at this end of the link with this [`crate::Link::binding`].
    pub fn prove(&self, binding: &[u8; 32]) -> Proof {
        let signature = self.pair.sign(&signed_by_node(binding));
        Proof { key: hex(&self.public().0), signature: hex(signature.as_ref()) }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.public())
    }
}

impl PublicKey {
    /// The key that a proof is for, if it holds for the link with this binding.
    pub fn proved(proof: &Proof, binding: &[u8; 32]) -> Result<PublicKey, IdentityError> {
        let key: [u8; 32] = unhex(&proof.key).ok_or(IdentityError::Proof)?;
        let signature: [u8; 64] = unhex(&proof.signature).ok_or(IdentityError::Proof)?;
        UnparsedPublicKey::new(&ED25519, key)
            .verify(&signed_by_node(binding), &signature)
            .map(|()| PublicKey(key))
            .map_err(|_| IdentityError::Proof)
    }

    /// What certificates of this key are known by.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&[SPKI.as_slice(), &self.0].concat())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..", hex(&self.0[..5]))
    }
}

impl FromStr for PublicKey {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        unhex(text).map(PublicKey).ok_or(IdentityError::Key)
    }
}

impl Fingerprint {
    /// Of a certificate's key; none if it is no certificate.
    pub fn of_certificate(certificate: &rustls::pki_types::CertificateDer<'_>) -> Option<Fingerprint> {
        let parsed = rustls::server::ParsedCertificate::try_from(certificate).ok()?;
        Some(Fingerprint::of(&parsed.subject_public_key_info()))
    }

    /// Of a SubjectPublicKeyInfo.
    pub(crate) fn of(spki: &[u8]) -> Fingerprint {
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest(&SHA256, spki).as_ref());
        Fingerprint(fingerprint)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Fingerprint {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        unhex(text)
            .map(Fingerprint)
            .ok_or(IdentityError::Link("the fingerprint is not 64 hexadecimal digits"))
    }
}

impl JoinToken {
    /// A new one.
    pub fn generate() -> Result<JoinToken, IdentityError> {
        random().map(JoinToken)
    }

    /// What a scheduler keeps of it: enough to know it again, not enough to use it.
    pub fn digest(&self) -> [u8; 32] {
        let mut kept = [0; 32];
        kept.copy_from_slice(digest(&SHA256, &self.0).as_ref());
        kept
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(..)")
    }
}

impl FromStr for JoinToken {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        unhex(text).map(JoinToken).ok_or(IdentityError::Link("the token is not 32 hexadecimal digits"))
    }
}

impl fmt::Display for JoinLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "weir://{}/{}/{}", self.addresses.join(","), self.cluster, self.token)
    }
}

impl FromStr for JoinLink {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text
            .trim()
            .strip_prefix("weir://")
            .ok_or(IdentityError::Link("it does not begin with weir://"))?;
        let mut parts = rest.split('/');
        let (Some(addresses), Some(cluster), Some(token), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(IdentityError::Link("it has not three parts"));
        };
        let addresses: Vec<String> = addresses.split(',').map(str::to_owned).collect();
        let has_port = |a: &String| {
            a.rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
        };
        if addresses.len() > ADDRESSES_MAX || !addresses.iter().all(has_port) {
            return Err(IdentityError::Link("an address is not HOST:PORT"));
        }
        Ok(JoinLink { addresses, cluster: cluster.parse()?, token: token.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_one_key_and_one_link() {
        let node = Identity::generate().unwrap();
        let again = Identity::from_pkcs8(node.pkcs8()).unwrap();
        assert_eq!(node.public(), again.public());
        let proof = node.prove(&[1; 32]);
        assert_eq!(PublicKey::proved(&proof, &[1; 32]), Ok(node.public()));
        assert_eq!(PublicKey::proved(&proof, &[2; 32]), Err(IdentityError::Proof), "replayed");
        let forged = Proof { key: Identity::generate().unwrap().public().to_string(), ..proof.clone() };
        assert_eq!(PublicKey::proved(&forged, &[1; 32]), Err(IdentityError::Proof));
        for (key, signature) in [("", ""), ("é", "é"), (proof.key.as_str(), "00")] {
            let broken = Proof { key: key.into(), signature: signature.into() };
            assert_eq!(PublicKey::proved(&broken, &[1; 32]), Err(IdentityError::Proof));
        }
        assert!(Identity::from_pkcs8(b"nonsense").is_err());
    }

    #[test]
    fn a_code_is_of_two_keys_and_one_link() {
        let [a, b] = [1, 2].map(|n| PublicKey([n; 32]));
        let first = code(Fingerprint([7; 32]), &a, &[0; 32]);
        assert_eq!(first, "S72T-VZBE", "frozen: both ends must show the same");
        for other in [
            code(Fingerprint([8; 32]), &a, &[0; 32]),
            code(Fingerprint([7; 32]), &b, &[0; 32]),
            code(Fingerprint([7; 32]), &a, &[1; 32]),
        ] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn join_links_are_read_as_written() {
        let link = JoinLink {
            addresses: vec!["[::1]:8485".into(), "küche.local:1".into()],
            cluster: Fingerprint([0xab; 32]),
            token: JoinToken([7; 16]),
        };
        assert_eq!(format!(" {link}\n").parse(), Ok(link.clone()));
        let good = link.to_string();
        for bad in [
            "",
            "http://x",
            &good[..good.len() - 1],
            &good.replace(":1/", "/"),
            &good.replace(":1/", ":0/"),
            &good.replace("ab", "zz"),
            &format!("{good}/x"),
        ] {
            assert!(matches!(bad.parse::<JoinLink>(), Err(IdentityError::Link(_))), "{bad}");
        }
    }
}
