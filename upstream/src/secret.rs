//! A provider's key.
use std::fmt;

/// A key. It is shown nowhere: [`fmt::Debug`] and [`Secret::redact`] hide it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The key in `text`, without the white space around it; none where nothing is left, or what no header can carry.
    pub fn new(text: &str) -> Option<Secret> {
        let text = text.trim();
        let fit = !text.is_empty() && text.len() <= 4096 && text.bytes().all(|b| b.is_ascii_graphic());
        fit.then(|| Secret(text.to_owned()))
    }

    /// The key itself, for the header that carries it and for nothing else.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }

    /// `text` with every occurrence of the key hidden.
    pub fn redact(&self, text: &str) -> String {
        text.replace(&self.0, "***")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_hidden() {
        let key = Secret::new(" sk-12345\n").unwrap();
        assert_eq!(format!("{key:?}"), "Secret(***)");
        assert_eq!(key.redact("no such key: sk-12345."), "no such key: ***.");
        assert!(Secret::new("").is_none() && Secret::new(" \n").is_none() && Secret::new("a\nb").is_none());
    }
}
