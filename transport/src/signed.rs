//! What is signed and hashed, the same for a program and for a page.

/// The path of WebTransport sessions; it names the protocol's version, as the ALPN does for native nodes.
pub const WEB_PATH: &str = "/weir/1";
/// What a node signs begins with this, so that its signature is good for nothing else.
const NODE: &[u8] = b"weir/1 node";
/// And the binding of a session hashes this.
const WEB: &[u8] = b"weir/1 web";

/// What a node signs to prove its key over a link with this [`crate::Link::binding`].
pub fn signed_by_node(binding: &[u8; 32]) -> Vec<u8> {
    [NODE, binding].concat()
}

/// What the binding of a WebTransport session is the SHA-256 of: the hash of the certificate that the node has seen, and the
/// bytes that the scheduler has sent it.
pub(crate) fn of_session(certificate: &[u8; 32], nonce: &[u8; 32]) -> Vec<u8> {
    [WEB, certificate, nonce].concat()
}
