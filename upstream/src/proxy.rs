//! Proxies that whoever runs this machine wants connections to go through: `https_proxy`, `http_proxy`, `no_proxy`.
use crate::address::Address;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::net::IpAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes that a proxy may answer with before a tunnel is open.
const HEAD_BYTES_MAX: usize = 8192;

/// Which connections go through which proxy. This machine itself is always reached straight.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    https: Option<Proxy>,
    http: Option<Proxy>,
    /// Hosts that are reached straight: names, with all that lie below them, addresses, or `*`.
    except: Vec<String>,
}

/// One proxy, spoken to in plain HTTP.
#[derive(Clone)]
pub struct Proxy {
    address: Address,
    /// The value of a `Proxy-Authorization` header.
    authorization: Option<String>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.address.authority)
    }
}

impl Proxies {
    /// By the environment's variables as `curl` reads them: small letters first; `HTTP_PROXY` in capitals doesn't count,
    /// since a web server may set it from a request's header. An error says which of them makes no sense.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Proxies, String> {
        let set = |names: &[&'static str]| {
            names.iter().find_map(|name| Some((*name, variable(name).filter(|value| !value.trim().is_empty())?)))
        };
        let proxy = |names: &[&'static str]| match set(names) {
            Some((name, value)) => Proxy::parse(&value).map(Some).ok_or_else(|| {
                format!("{name} is no proxy's address; expected http://[USER:PASSWORD@]HOST[:PORT]")
            }),
            None => Ok(None),
        };
        let except = set(&["no_proxy", "NO_PROXY"]).map(|(_, value)| value).unwrap_or_default();
        let except = except.split(',').map(|host| host.trim().to_ascii_lowercase());
        Ok(Proxies {
            https: proxy(&["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])?,
            http: proxy(&["http_proxy", "all_proxy", "ALL_PROXY"])?,
            except: except.filter(|host| !host.is_empty()).collect(),
        })
    }

    /// The proxy for an address, if it isn't reached straight.
    pub fn to(&self, address: &Address) -> Option<&Proxy> {
        let proxy = if address.tls { &self.https } else { &self.http }.as_ref()?;
        let host = address.host.to_ascii_lowercase();
        let here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let straight = |except: &String| {
            let except = except.strip_suffix(&format!(":{}", address.port)).unwrap_or(except);
            let name = except.trim_start_matches("*.").trim_start_matches('.');
            let below = host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'));
            except == "*" || host == name.trim_matches(['[', ']']) || below && !name.is_empty()
        };
        (!here && !self.except.iter().any(straight)).then_some(proxy)
    }
}

impl Proxy {
    fn parse(text: &str) -> Option<Proxy> {
        let (scheme, rest) = text.trim().split_once("://").unwrap_or(("http", text.trim()));
        let (user, host) = rest.rsplit_once('@').map_or((None, rest), |(user, host)| (Some(user), host));
        let address = Address::parse(&format!("{scheme}://{host}")).filter(|address| !address.tls)?;
        let user = user.map(decoded);
        let authorization = user.map(|user| format!("Basic {}", STANDARD.encode(user)));
        Some(Proxy { address, authorization })
    }

    /// What requests for plain addresses say to it of who asks.
    pub fn authorization(&self) -> Option<&str> {
        self.authorization.as_deref()
    }

    /// Connects to it.
    pub async fn connect(&self) -> Result<TcpStream, String> {
        let stream = TcpStream::connect((self.address.host.as_str(), self.address.port)).await;
        stream.map_err(|error| format!("the proxy {}: {error}", self.address.authority))
    }

    /// Has it open a tunnel to an address.
    pub async fn tunnel(&self, to: &Address) -> Result<TcpStream, String> {
        let mut stream = self.connect().await?;
        let failed = |error: std::io::Error| format!("the proxy {}: {error}", self.address.authority);
        let host = if to.host.contains(':') { format!("[{}]", to.host) } else { to.host.clone() };
        let at = format!("{host}:{}", to.port);
        let who = self.authorization.as_ref().map(|who| format!("proxy-authorization: {who}\r\n"));
        let ask = format!("CONNECT {at} HTTP/1.1\r\nhost: {at}\r\n{}\r\n", who.unwrap_or_default());
        stream.write_all(ask.as_bytes()).await.map_err(failed)?;
        // Byte by byte: what follows the head is the tunnel's.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
            head.push(stream.read_u8().await.map_err(failed)?);
        }
        let line = String::from_utf8_lossy(&head);
        let line = line.lines().next().unwrap_or_default();
        match line.split(' ').nth(1) {
            Some(status) if status.starts_with('2') => Ok(stream),
            Some("407") => Err(format!(
                "the proxy {} wants to know who asks; give it USER:PASSWORD@ in https_proxy",
                self.address.authority
            )),
            _ => Err(format!(
                "the proxy {} opens no tunnel to {at}: {}",
                self.address.authority,
                crate::error::excerpt(line)
            )),
        }
    }
}

/// Without percent signs: passwords may have characters that addresses may not.
fn decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let byte = match (first, after) {
            (b'%', [a, b, ..]) => {
                let digit = |c: &u8| char::from(*c).to_digit(16);
                digit(a).zip(digit(b)).map(|(a, b)| (a * 16 + b) as u8)
            }
            _ => None,
        };
        out.push(byte.unwrap_or(*first));
        rest = &rest[if byte.is_some() { 3 } else { 1 }..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(set: &[(&str, &str)]) -> Result<Proxies, String> {
        let set: Vec<(String, String)> = set.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
        Proxies::from_env(move |name| set.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone()))
    }

    #[test]
    fn the_environment_says_who_is_reached_how() {
        let check = |set: &[(&str, &str)], url: &str, expected: Option<&str>| {
            let address = Address::parse(url).unwrap();
            let proxies = proxies(set).unwrap();
            let got = proxies.to(&address).map(|proxy| proxy.address.authority.clone());
            assert_eq!(got.as_deref(), expected, "{url} with {set:?}");
        };
        let both = [("https_proxy", "http://p:3128"), ("http_proxy", "q:80")];
        check(&[], "https://api.example", None);
        check(&both, "https://api.example", Some("p:3128"));
        check(&both, "http://api.example", Some("q:80"));
        for here in ["http://localhost:8000", "http://127.0.0.1:1", "http://[::1]:8000"] {
            check(&both, here, None);
        }
        check(&[("HTTPS_PROXY", "http://P:1")], "https://api.example", Some("P:1"));
        check(&[("HTTP_PROXY", "http://P:1")], "http://api.example", None);
        check(&[("all_proxy", "http://P:1")], "http://api.example", Some("P:1"));
        let except = |hosts: &'static str| [("https_proxy", "http://p:1"), ("no_proxy", hosts)];
        check(&except("example"), "https://api.example", None);
        check(&except(".example, other"), "https://api.example", None);
        check(&except("ample"), "https://api.example", Some("p:1"));
        check(&except("api.example:443"), "https://api.example", None);
        check(&except("api.example:444"), "https://api.example", Some("p:1"));
        check(&except("10.0.0.1"), "https://10.0.0.1", None);
        check(&except("*"), "https://api.example", None);
        for bad in ["https://p:1", "socks5://p", "http://", "http://p:x"] {
            assert!(proxies(&[("https_proxy", bad)]).unwrap_err().contains("https_proxy"), "{bad}");
        }
    }

    #[test]
    fn who_asks_is_told_and_not_shown() {
        let proxy = Proxy::parse("http://me:p%40ss@p:1").unwrap();
        assert_eq!(proxy.authorization(), Some("Basic bWU6cEBzcw=="));
        assert_eq!(format!("{proxy:?}"), "p:1");
    }
}
