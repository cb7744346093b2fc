//! Frames out of the chunks in which a stream hands over its bytes.
use super::{Frame, FrameError, HEADER_BYTES};
use bytes::{Buf, Bytes, BytesMut};

/// Puts frames together: [`push`](Assembler::push) a chunk, then [`take`](Assembler::take) until there is none.
#[derive(Debug, Default)]
pub struct Assembler {
    /// What has not been looked at yet.
    chunk: Bytes,
    /// The beginning of a frame that lies in several chunks.
    partial: BytesMut,
}

impl Assembler {
    /// The next chunk. What was pushed before must have been taken.
    pub fn push(&mut self, chunk: Bytes) {
        debug_assert!(self.chunk.is_empty(), "frames are taken before more is pushed");
        self.chunk = chunk;
    }

    /// A frame from what has come. One that lies within a chunk is not copied. At most one whole frame and one chunk are
    /// held, whatever comes.
    pub fn take(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.partial.is_empty() && self.chunk.len() >= HEADER_BYTES {
            let whole = length(&self.chunk)?;
            if whole <= self.chunk.len() {
                return Ok(Some(Frame::parse(self.chunk.split_to(whole))?));
            }
        }
        while !self.chunk.is_empty() {
            let more = (self.wanted()? - self.partial.len()).min(self.chunk.len());
            self.partial.extend_from_slice(&self.chunk[..more]);
            self.chunk.advance(more);
            if self.partial.len() >= HEADER_BYTES && self.partial.len() == length(&self.partial)? {
                return Ok(Some(Frame::parse(self.partial.split().freeze())?));
            }
        }
        Ok(None)
    }

    /// Whether the stream may end here.
    pub fn end(&self) -> Result<(), FrameError> {
        match self.partial.len() {
            0 => Ok(()),
            got => Err(FrameError::Length { got, want: self.wanted()? }),
        }
    }

    /// How long the partial frame has to become, as far as is known.
    fn wanted(&self) -> Result<usize, FrameError> {
        if self.partial.len() < HEADER_BYTES { Ok(HEADER_BYTES) } else { length(&self.partial) }
    }
}

/// Of the frame that begins here, header included.
fn length(bytes: &[u8]) -> Result<usize, FrameError> {
    let header = bytes.first_chunk().ok_or(FrameError::Length { got: bytes.len(), want: HEADER_BYTES })?;
    Ok(HEADER_BYTES + Frame::parse_header(header)?.1)
}
