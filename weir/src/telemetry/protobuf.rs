//! As much of protobuf's encoding as OTLP's messages take. <https://protobuf.dev/programming-guides/encoding/>

/// A message as it is written. Fields that have their default value may be left out.
#[derive(Debug, Default)]
pub(super) struct Message(Vec<u8>);

const VARINT: u32 = 0;
const FIXED64: u32 = 1;
const BYTES: u32 = 2;
const FIXED32: u32 = 5;

impl Message {
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn tag(&mut self, field: u32, kind: u32) {
        self.number(u64::from(field << 3 | kind));
    }

    /// `uint32`, `uint64`, `bool`, enums.
    pub fn varint(&mut self, field: u32, value: u64) {
        self.tag(field, VARINT);
        self.number(value);
    }

    /// `int64`.
    pub fn int(&mut self, field: u32, value: i64) {
        self.varint(field, value as u64);
    }

    /// `fixed64`.
    pub fn fixed64(&mut self, field: u32, value: u64) {
        self.tag(field, FIXED64);
        self.0.extend(value.to_le_bytes());
    }

    /// `fixed32`.
    pub fn fixed32(&mut self, field: u32, value: u32) {
        self.tag(field, FIXED32);
        self.0.extend(value.to_le_bytes());
    }

    /// `double`.
    pub fn double(&mut self, field: u32, value: f64) {
        self.fixed64(field, value.to_bits());
    }

    /// `bytes`, `string`.
    pub fn bytes(&mut self, field: u32, value: &[u8]) {
        self.tag(field, BYTES);
        self.number(value.len() as u64);
        self.0.extend(value);
    }

    /// `string`.
    pub fn text(&mut self, field: u32, value: &str) {
        self.bytes(field, value.as_bytes());
    }

    /// A message within.
    pub fn message(&mut self, field: u32, write: impl FnOnce(&mut Message)) {
        let mut inner = Message::default();
        write(&mut inner);
        self.bytes(field, &inner.0);
    }

    /// `repeated fixed64` and `repeated double`, packed.
    pub fn packed64(&mut self, field: u32, values: impl ExactSizeIterator<Item = u64>) {
        self.tag(field, BYTES);
        self.number(8 * values.len() as u64);
        values.for_each(|value| self.0.extend(value.to_le_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_documentation_gives_as_examples() {
        let check = |write: &dyn Fn(&mut Message), expected: &[u8]| {
            let mut message = Message::default();
            write(&mut message);
            assert_eq!(message.into_bytes(), expected);
        };
        check(&|m| m.varint(1, 150), &[0x08, 0x96, 0x01]);
        check(&|m| m.text(2, "testing"), b"\x12\x07testing");
        check(&|m| m.message(3, |m| m.varint(1, 150)), &[0x1a, 0x03, 0x08, 0x96, 0x01]);
        check(&|m| m.int(1, -2), &[0x08, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]);
        check(&|m| m.double(1, 1.0), &[0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f]);
        check(&|m| m.fixed32(16, 1), &[0x85, 0x01, 1, 0, 0, 0]);
        check(&|m| m.packed64(4, [1].into_iter()), &[0x22, 8, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
