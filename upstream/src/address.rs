//! The address of a server that speaks OpenAI's API, or another with versions in its paths.

/// `https://host:port/base`, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Address {
    /// Whether connections are encrypted.
    pub tls: bool,
    /// Without brackets.
    pub host: String,
    /// The scheme's own where the address has none.
    pub port: u16,
    /// As in a `Host` header.
    pub authority: String,
    /// Ends with a version, not with a slash.
    base: String,
    /// What comes before the version.
    root: String,
}

impl Address {
    /// `/v1` is added where the path has no version, `http` where there is no scheme; none where it is no such address.
    pub fn parse(url: &str) -> Option<Address> {
        let (scheme, rest) = url.trim().split_once("://").unwrap_or(("http", url.trim()));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let strange = |c: char| !c.is_ascii_graphic() || "@?#\\\"<>".contains(c);
        if authority.is_empty() || rest.contains(strange) {
            return None;
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => v6.split_once(']')?,
            None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
        };
        let port = match (port, tls) {
            ("", false) => 80,
            ("", true) => 443,
            (port, _) => port.strip_prefix(':')?.parse().ok()?,
        };
        if host.is_empty() {
            return None;
        }
        let path = path.trim_end_matches('/');
        // A version anywhere: Google's compatible API lies below one.
        let is_version =
            |part: &str| part.strip_prefix('v').is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()));
        let (root, base) = match path.split('/').any(is_version) {
            true => {
                let at = path.rfind('/').filter(|at| is_version(&path[at + 1..]));
                (path[..at.unwrap_or(path.len())].to_owned(), path.to_owned())
            }
            false => (path.to_owned(), format!("{path}/v1")),
        };
        Some(Address { tls, host: host.to_owned(), port, authority: authority.to_owned(), base, root })
    }

    /// The path of an endpoint, such as `chat/completions`; with a slash before it, below the root instead of the version.
    pub fn path(&self, endpoint: &str) -> String {
        match endpoint.strip_prefix('/') {
            Some(endpoint) => format!("{}/{endpoint}", self.root),
            None => format!("{}/{endpoint}", self.base),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let check = |url: &str, expected: Option<(bool, &str, u16, &str, &str)>| {
            let address = Address::parse(url);
            let paths = address.as_ref().map(|a| (a.path("models"), a.path("/health")));
            let parts = address
                .as_ref()
                .zip(paths.as_ref())
                .map(|(a, (m, h))| (a.tls, a.host.as_str(), a.port, m.as_str(), h.as_str()));
            assert_eq!(parts, expected, "{url}");
        };
        check("http://127.0.0.1:8000", Some((false, "127.0.0.1", 8000, "/v1/models", "/health")));
        check("box:11434/", Some((false, "box", 11434, "/v1/models", "/health")));
        check("localhost:8484/", Some((false, "localhost", 8484, "/v1/models", "/health")));
        check("https://a.example/api", Some((true, "a.example", 443, "/api/v1/models", "/api/health")));
        check("https://a.example/x/v2", Some((true, "a.example", 443, "/x/v2/models", "/x/health")));
        let google = "/v1beta/openai/models";
        check(
            "https://g.example/v1beta/openai/",
            Some((true, "g.example", 443, google, "/v1beta/openai/health")),
        );
        check("http://[::1]:80/v1", Some((false, "::1", 80, "/v1/models", "/health")));
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
