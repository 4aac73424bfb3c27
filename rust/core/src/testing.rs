//! A small writer of DICOM objects, for the tests of this crate.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

pub const IMPLICIT: &str = "1.2.840.10008.1.2";
pub const EXPLICIT: &str = "1.2.840.10008.1.2.1";
pub const BIG: &str = "1.2.840.10008.1.2.2";
pub const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
pub const UNDEFINED: u32 = u32::MAX;

/// Writes elements one after the other in one encoding.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    pub implicit: bool,
    pub big: bool,
    pub bytes: Vec<u8>,
}

impl Writer {
    pub fn new(syntax: &str) -> Self {
        Writer {
            implicit: syntax == IMPLICIT,
            big: syntax == BIG,
            bytes: Vec::new(),
        }
    }

    pub fn u16(&mut self, number: u16) {
        let bytes = if self.big {
            number.to_be_bytes()
        } else {
            number.to_le_bytes()
        };
        self.bytes.extend(bytes);
    }

    pub fn u32(&mut self, number: u32) {
        let bytes = if self.big {
            number.to_be_bytes()
        } else {
            number.to_le_bytes()
        };
        self.bytes.extend(bytes);
    }

    pub fn tag(&mut self, tag: u32) {
        self.u16((tag >> 16) as u16);
        self.u16(tag as u16);
    }

    /// The header of an element, with any length.
    pub fn header(&mut self, tag: u32, vr: &str, length: u32) {
        self.tag(tag);
        if self.implicit || vr.is_empty() {
            self.u32(length);
        } else if ["OB", "OW", "OF", "SQ", "UN", "UT", "UC"].contains(&vr) {
            self.bytes.extend(vr.bytes());
            self.u16(0);
            self.u32(length);
        } else {
            self.bytes.extend(vr.bytes());
            self.u16(length as u16);
        }
    }

    pub fn put(mut self, tag: u32, vr: &str, value: &[u8]) -> Self {
        self.header(tag, vr, value.len() as u32);
        self.bytes.extend(value);
        self
    }

    pub fn text(self, tag: u32, vr: &str, value: &str) -> Self {
        let even = if value.len() % 2 == 1 {
            format!("{value} ")
        } else {
            value.to_owned()
        };
        self.put(tag, vr, even.as_bytes())
    }

    pub fn us(self, tag: u32, number: u16) -> Self {
        let bytes = if self.big {
            number.to_be_bytes()
        } else {
            number.to_le_bytes()
        };
        self.put(tag, "US", &bytes)
    }

    /// A header whose length may lie.
    pub fn lie(mut self, tag: u32, vr: &str, length: u32, value: &[u8]) -> Self {
        self.header(tag, vr, length);
        self.bytes.extend(value);
        self
    }

    /// A sequence with one item around what `inner` holds.
    pub fn sequence(mut self, tag: u32, vr: &str, inner: &Writer, defined: bool) -> Self {
        let length = inner.bytes.len() as u32;
        self.header(tag, vr, if defined { length + 8 } else { UNDEFINED });
        self.header(0xFFFE_E000, "", if defined { length } else { UNDEFINED });
        self.bytes.extend(&inner.bytes);
        if !defined {
            self.header(0xFFFE_E00D, "", 0);
            self.header(0xFFFE_E0DD, "", 0);
        }
        self
    }

    /// Encapsulated pixel data (PS3.5 section A.4) without the closing delimiter.
    pub fn fragments(mut self, parts: &[&[u8]]) -> Self {
        self.header(0x7FE0_0010, "OB", UNDEFINED);
        for part in parts {
            self.header(0xFFFE_E000, "", part.len() as u32);
            self.bytes.extend(*part);
        }
        self
    }

    pub fn end_of_sequence(mut self) -> Self {
        self.header(0xFFFE_E0DD, "", 0);
        self
    }

    /// With preamble and File Meta Information in front.
    pub fn part10(&self, syntax: &str) -> Vec<u8> {
        let meta = Writer::new(EXPLICIT)
            .text(0x0002_0003, "UI", "1.2.3.4")
            .text(0x0002_0010, "UI", syntax);
        let mut object = Writer::new(EXPLICIT);
        object.bytes = vec![0; 128];
        object.bytes.extend(b"DICM");
        let length = (meta.bytes.len() as u32).to_le_bytes();
        let mut object = object.put(0x0002_0000, "UL", &length);
        object.bytes.extend(meta.bytes);
        object.bytes.extend(&self.bytes);
        object.bytes
    }
}

/// A 3 x 2 image of 16 bit cells.
pub fn image(syntax: &str) -> Writer {
    let mut writer = Writer::new(syntax)
        .text(0x0008_0016, "UI", "1.2.840.10008.5.1.4.1.1.2")
        .text(0x0008_0018, "UI", "1.2.3.4.5")
        .text(0x0008_0060, "CS", "CT")
        .text(0x0020_0013, "IS", "7")
        .text(0x0020_0032, "DS", "-1.5\\2\\3e0")
        .text(0x0020_0037, "DS", "1\\0\\0\\0\\1\\0")
        .us(0x0028_0002, 1)
        .us(0x0028_0010, 2)
        .us(0x0028_0011, 3)
        .text(0x0028_0030, "DS", "0.5\\0.25")
        .us(0x0028_0100, 16)
        .us(0x0028_0101, 12)
        .us(0x0028_0102, 11)
        .us(0x0028_0103, 0)
        .text(0x0028_1052, "DS", "-1024")
        .text(0x0028_1053, "DS", "1");
    writer.header(0x7FE0_0010, "OW", 12);
    for number in [0_u16, 1, 2, 0xF003, 1024, 4095] {
        writer.u16(number);
    }
    writer
}

/// A file that is gone with the value.
pub struct TemporaryFile(PathBuf);

impl TemporaryFile {
    pub fn new(bytes: &[u8]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("dicomnode-core-test-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        TemporaryFile(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // A file that is left behind is no reason to fail.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Numbers without a pattern, the same in every run.
pub struct Noise(u64);

impl Noise {
    pub fn new() -> Self {
        Noise(0x9E37_79B9_7F4A_7C15)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
