//! The address of a gateway.
use crate::ClientError;

/// `https://host:port/base`, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Address {
    /// Whether the connection is encrypted.
    pub(super) tls: bool,
    /// Without brackets.
    pub(super) host: String,
    pub(super) port: u16,
    /// As in a `Host` header.
    pub(super) authority: String,
    /// Ends with a version, not with a slash.
    base: String,
}

impl Address {
    /// `/v1` is added where the address doesn't end with a version.
    pub(super) fn parse(url: &str) -> Result<Address, ClientError> {
        let wrong = || ClientError::Url(url.to_owned());
        let trimmed = url.trim();
        let (scheme, rest) = trimmed.split_once("://").unwrap_or(("http", trimmed));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(wrong()),
        };
        let cut = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(cut);
        let strange = |c: char| !c.is_ascii_graphic() || "@?#\\\"<>".contains(c);
        if authority.is_empty() || rest.contains(strange) {
            return Err(wrong());
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => v6.split_once(']').ok_or_else(wrong)?,
            None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
        };
        let port = match (port, tls) {
            ("", false) => 80,
            ("", true) => 443,
            (port, _) => port.strip_prefix(':').and_then(|p| p.parse().ok()).ok_or_else(wrong)?,
        };
        if host.is_empty() {
            return Err(wrong());
        }
        let path = path.trim_end_matches('/');
        let last = path.rsplit('/').next().unwrap_or_default();
        let versioned = last.strip_prefix('v').is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()));
        let base = if versioned { path.to_owned() } else { format!("{path}/v1") };
        Ok(Address { tls, host: host.to_owned(), port, authority: authority.to_owned(), base })
    }

    /// The path of an endpoint, such as `chat/completions`.
    pub(super) fn path(&self, endpoint: &str) -> String {
        format!("{}/{endpoint}", self.base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let check = |url: &str, expected: Option<(bool, &str, u16, &str)>| {
            let address = Address::parse(url).ok();
            let models = address.as_ref().map(|a| a.path("models"));
            let parts =
                address.as_ref().zip(models.as_deref()).map(|(a, m)| (a.tls, a.host.as_str(), a.port, m));
            assert_eq!(parts, expected, "{url}");
        };
        check("http://127.0.0.1:8484", Some((false, "127.0.0.1", 8484, "/v1/models")));
        check("localhost:8484/", Some((false, "localhost", 8484, "/v1/models")));
        check(
            "https://api.example.org/openai/v2/",
            Some((true, "api.example.org", 443, "/openai/v2/models")),
        );
        check("https://example.org/api", Some((true, "example.org", 443, "/api/v1/models")));
        check("http://[::1]:80/v1", Some((false, "::1", 80, "/v1/models")));
        for bad in [
            "",
            "ftp://x",
            "http://",
            "http://:80",
            "http://x:y",
            "http://u:p@x",
            "http://[::1",
            "http://x/a b",
        ] {
            check(bad, None);
        }
    }
}
