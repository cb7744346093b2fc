//! Server-sent events: <https://html.spec.whatwg.org/multipage/server-sent-events.html>, as far as data goes.

/// Bytes that one event may have; larger ones end the stream.
pub const EVENT_BYTES_MAX: usize = 1 << 20;

/// Cuts a body into the data of its events, wherever the network cut it. What it holds is bounded by
/// [`EVENT_BYTES_MAX`].
#[derive(Debug, Default)]
pub struct Events {
    /// The beginning of a line.
    line: Vec<u8>,
    /// Data lines of the event so far, each with a newline.
    data: Vec<u8>,
    /// The last byte was a carriage return: a line feed after it belongs to it.
    after_return: bool,
    lines: u64,
}

/// An event had more than [`EVENT_BYTES_MAX`] bytes.
#[derive(Debug, PartialEq)]
pub struct TooLong;

impl Events {
    /// Takes the next bytes; gives the data of the events that they complete to `event`, until it says no.
    pub fn push<E>(
        &mut self,
        bytes: &[u8],
        mut event: impl FnMut(&str) -> Result<(), E>,
    ) -> Result<Result<(), TooLong>, E> {
        for &byte in bytes {
            let follows_return = std::mem::replace(&mut self.after_return, byte == b'\r');
            match byte {
                b'\n' if follows_return => {}
                b'\n' | b'\r' => self.end_line(&mut event)?,
                _ if self.line.len() + self.data.len() >= EVENT_BYTES_MAX => return Ok(Err(TooLong)),
                _ => self.line.push(byte),
            }
        }
        Ok(Ok(()))
    }

    /// Lines that have ended: comments, too, are a sign of life.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    fn end_line<E>(&mut self, event: &mut impl FnMut(&str) -> Result<(), E>) -> Result<(), E> {
        self.lines += 1;
        if self.line.is_empty() {
            let data = std::mem::take(&mut self.data);
            return match data.split_last() {
                Some((_, data)) => event(&String::from_utf8_lossy(data)),
                None => Ok(()),
            };
        }
        if let Some(value) = self.line.strip_prefix(b"data:") {
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            self.data.push(b'\n');
        }
        self.line.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let (mut parser, mut seen) = (Events::default(), Vec::new());
        for chunk in chunks {
            let never: Result<_, ()> = parser.push(chunk, |e| {
                seen.push(e.to_owned());
                Ok(())
            });
            assert_eq!(never, Ok(Ok(())));
        }
        seen
    }

    #[test]
    fn events_are_the_same_wherever_they_are_cut() {
        let check = |body: &str, expected: &[&str]| {
            let bytes = body.as_bytes();
            assert_eq!(events(&[bytes]), expected);
            assert_eq!(events(&bytes.chunks(1).collect::<Vec<_>>()), expected);
            for cut in 0..bytes.len() {
                assert_eq!(events(&[&bytes[..cut], &bytes[cut..]]), expected, "cut at {cut}");
            }
        };
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data: a\r\n\r\ndata:b\r\r", &["a", "b"]);
        check(": ping\n\nevent: x\nid: 3\ndata: größe €\n\n", &["größe €"]);
        check("data: a\ndata: b\n\n", &["a\nb"]);
        check("data:\n\ndata: unfinished\n", &[""]);
    }

    #[test]
    fn an_endless_event_ends_the_stream() {
        let mut parser = Events::default();
        let chunk = [b'x'; 4096];
        let outcome =
            (0..1000).map(|_| parser.push(&chunk, |_| Ok::<(), ()>(())).unwrap()).find(|r| r.is_err());
        assert_eq!(outcome, Some(Err(TooLong)));
    }
}
