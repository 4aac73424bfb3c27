//! The header scanner: where every top-level element of one object lies.
//!
//! The problem: routing and stacking need a dozen attributes of each of many thousand objects, and
//! the objects come from the network. A full decoder builds hundreds of values that nobody asked
//! for and believes what the bytes say about themselves. The scanner walks the element headers
//! (PS3.5 section 7.1) once, notes offsets, decodes nothing, and checks every length against what is
//! left before it moves. It allocates by what it has read, never by what is declared; it has no
//! recursion; it stops at the pixel data.
//!
//! It does not know the data dictionary. In Implicit VR a sequence of defined length is recognised
//! by its content (it starts with an item tag) and is walked for its depth only; what looks wrong
//! inside it, or inside a private sequence of defined length, is skipped by the declared length.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::{Error, Result};
use crate::source::{self, Source, Stamp, ended};

/// Float Pixel Data, Double Float Pixel Data, Pixel Data (PS3.3 C.7.6.3, C.7.6.24).
pub const FLOAT_PIXEL_DATA: u32 = 0x7FE0_0008;
/// See [`FLOAT_PIXEL_DATA`].
pub const DOUBLE_FLOAT_PIXEL_DATA: u32 = 0x7FE0_0009;
/// See [`FLOAT_PIXEL_DATA`].
pub const PIXEL_DATA: u32 = 0x7FE0_0010;

/// The length that stands for "ends at a delimiter" (PS3.5 section 7.1.2).
pub const UNDEFINED: u32 = 0xFFFF_FFFF;

/// Deepest nesting of sequences that is walked.
const MAX_DEPTH: usize = 64;
/// Most elements at the top level.
const MAX_ELEMENTS: usize = 100_000;
/// Most items of sequences and fragments of nested pixel data.
const MAX_ITEMS: usize = 1_000_000;
/// Most elements inside items.
const MAX_NESTED: usize = 10_000_000;
/// First read of a file.
const FIRST_READ: usize = 16 << 10;
/// First read after a value that was skipped.
const NEXT_READ: usize = 4 << 10;
/// Most that a window of a file grows by in one step.
const MAX_STEP: usize = 4 << 20;
/// Longest value of a file that is kept even where it does not lie in what was read anyway.
const KEEP: u32 = 16 << 10;
/// Longest inflated object, and longest relative to its deflated bytes.
const MAX_INFLATED: usize = 1 << 30;
/// Deflate cannot reach 1100 times.
const MAX_RATIO: usize = 1100;

const SEQUENCE_DELIMITER: u32 = 0xFFFE_E0DD;
const ITEM_DELIMITER: u32 = 0xFFFE_E00D;
const ITEM: u32 = 0xFFFE_E000;

const IMPLICIT_LITTLE: &str = "1.2.840.10008.1.2";
const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";
const EXPLICIT_BIG: &str = "1.2.840.10008.1.2.2";

/// How a dataset is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Encoding {
    implicit: bool,
    big: bool,
}

impl Encoding {
    /// Implicit VR Little Endian.
    pub(crate) const IMPLICIT: Encoding = Encoding {
        implicit: true,
        big: false,
    };

    pub(crate) fn is_big(self) -> bool {
        self.big
    }

    pub(crate) fn u16(self, bytes: &[u8], at: usize) -> u16 {
        if self.big {
            be16(bytes, at)
        } else {
            le16(bytes, at)
        }
    }

    pub(crate) fn u32(self, bytes: &[u8], at: usize) -> u32 {
        if self.big {
            be32(bytes, at)
        } else {
            le32(bytes, at)
        }
    }

    pub(crate) fn tag(self, bytes: &[u8]) -> u32 {
        u32::from(self.u16(bytes, 0)) << 16 | u32::from(self.u16(bytes, 2))
    }
}

/// What a Transfer Syntax UID says (PS3.5 annex A).
#[derive(Debug, Clone, Copy)]
struct Syntax {
    encoding: Encoding,
    deflated: bool,
    /// Pixel data of defined length is uncompressed.
    native: bool,
    big_pixels: bool,
}

/// Whether the bytes of a dataset in this transfer syntax are deflated: a few may become many.
#[must_use]
pub fn is_deflated(transfer_syntax: &str) -> bool {
    syntax(transfer_syntax).deflated
}

fn syntax(uid: &str) -> Syntax {
    let explicit = Encoding {
        implicit: false,
        big: false,
    };
    let implicit = Encoding {
        implicit: true,
        big: false,
    };
    let plain = Syntax {
        encoding: explicit,
        deflated: false,
        native: true,
        big_pixels: false,
    };
    match uid {
        IMPLICIT_LITTLE => Syntax {
            encoding: implicit,
            ..plain
        },
        EXPLICIT_LITTLE => plain,
        EXPLICIT_BIG => Syntax {
            encoding: Encoding {
                implicit: false,
                big: true,
            },
            big_pixels: true,
            ..plain
        },
        "1.2.840.10008.1.2.1.99" => Syntax {
            deflated: true,
            ..plain
        },
        // JPIP with a deflated dataset: no pixels inside.
        "1.2.840.10008.1.2.4.95" | "1.2.840.10008.1.2.4.205" => Syntax {
            deflated: true,
            native: false,
            ..plain
        },
        // GE's private syntax: Implicit VR Little Endian with big endian pixel data.
        "1.2.840.113619.5.2" => Syntax {
            encoding: implicit,
            big_pixels: true,
            ..plain
        },
        _ => Syntax {
            native: false,
            ..plain
        },
    }
}

/// One element: its tag, its VR as written (zeros where the encoding has none) and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub tag: u32,
    pub vr: [u8; 2],
    /// Declared length, [`UNDEFINED`] included.
    pub length: u32,
    /// Where the value starts: in the source, or in the inflated object.
    pub offset: u64,
}

impl Entry {
    /// Whether this is one of the three kinds of pixel data.
    pub fn is_pixels(&self) -> bool {
        is_pixels(self.tag)
    }

    /// The VR as text, empty where the encoding has none.
    pub fn vr(&self) -> &str {
        match &self.vr {
            [0, 0] => "",
            vr => std::str::from_utf8(vr).unwrap_or(""),
        }
    }
}

fn is_pixels(tag: u32) -> bool {
    matches!(tag, PIXEL_DATA | FLOAT_PIXEL_DATA | DOUBLE_FLOAT_PIXEL_DATA)
}

/// The outcome of a scan: every top-level element up to and with the pixel data.
#[derive(Debug, Default)]
pub struct Layout {
    entries: Vec<Entry>,
    /// Indices of `entries` sorted by tag, later ones later, where the file is not in order.
    order: Option<Vec<u32>>,
    transfer_syntax: String,
    encoding: Option<Encoding>,
    big_endian: bool,
    big_pixels: bool,
    native: bool,
}

impl Layout {
    /// Transfer Syntax UID of the dataset, guessed where the object does not say it.
    pub fn transfer_syntax(&self) -> &str {
        &self.transfer_syntax
    }

    /// Whether the dataset is encoded big endian.
    pub fn big_endian(&self) -> bool {
        self.big_endian
    }

    /// How the elements are encoded.
    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding.unwrap_or(Encoding::IMPLICIT)
    }

    /// Whether native pixel data is big endian.
    pub fn big_endian_pixels(&self) -> bool {
        self.big_pixels
    }

    /// Every element in the order of the file, group 0002 included.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The element with that tag; the last of them if the object breaks the rule of one.
    pub fn find(&self, tag: u32) -> Option<&Entry> {
        match &self.order {
            None => {
                let at = self
                    .entries
                    .binary_search_by_key(&tag, |entry| entry.tag)
                    .ok()?;
                self.entries.get(at)
            }
            Some(order) => {
                let tag_of = |i: &u32| self.entries.get(*i as usize).map_or(u32::MAX, |e| e.tag);
                let after = order.partition_point(|i| tag_of(i) <= tag);
                let last = order.get(after.checked_sub(1)?)?;
                self.entries
                    .get(*last as usize)
                    .filter(|entry| entry.tag == tag)
            }
        }
    }

    /// The tags of the dataset in the order of the file, each once, group 0002 left out.
    pub fn tags(&self) -> Vec<u32> {
        let tags = self
            .entries
            .iter()
            .map(|entry| entry.tag)
            .filter(|tag| tag >> 16 != 2);
        match &self.order {
            None => tags.collect(),
            Some(_) => {
                let mut seen = HashSet::new();
                tags.filter(|tag| seen.insert(*tag)).collect()
            }
        }
    }

    /// The top-level pixel data.
    pub fn pixels(&self) -> Option<&Entry> {
        self.entries.last().filter(|entry| entry.is_pixels())
    }

    /// Whether the pixel data is there and uncompressed.
    pub fn is_native(&self) -> bool {
        self.native && self.pixels().is_some_and(|entry| entry.length != UNDEFINED)
    }

    fn push(&mut self, entry: Entry) -> Result<()> {
        if self.entries.len() >= MAX_ELEMENTS {
            return Err(Error::invalid_at(
                entry.tag,
                format!("expected at most {MAX_ELEMENTS} top-level elements, found more"),
            ));
        }
        self.entries.push(entry);
        Ok(())
    }

    fn sort(&mut self) {
        if !self.entries.is_sorted_by(|a, b| a.tag < b.tag) {
            let mut order: Vec<u32> = (0..).take(self.entries.len()).collect();
            order.sort_by_key(|i| self.entries.get(*i as usize).map_or(u32::MAX, |e| e.tag));
            self.order = Some(order);
        }
    }
}

/// The bytes that a scan leaves behind for reading values.
#[derive(Debug)]
enum Held {
    /// None: the caller has the whole object.
    Callers,
    /// Parts of a file, and its path for longer values.
    Windows { path: PathBuf, parts: Vec<Part> },
    /// A deflated object, inflated, with the meta information before it.
    Inflated(Vec<u8>),
}

/// A part of a file: where it starts, and its bytes.
#[derive(Debug)]
struct Part {
    offset: u64,
    bytes: Vec<u8>,
}

/// An element and its raw value.
pub type Found<'a> = (&'a Entry, Cow<'a, [u8]>);

/// A scanned object and the bytes up to its pixel data.
#[derive(Debug)]
pub struct Header {
    layout: Layout,
    held: Held,
}

impl Header {
    /// Where the elements lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether every value is found without reading a file.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        !matches!(self.held, Held::Windows { .. })
    }

    /// VR and raw value of a top-level element, except pixel data and values of undefined length.
    ///
    /// `whole` is the object that was scanned, where it was bytes. A long value of a file, which
    /// the scan skipped, is read now.
    pub fn value<'a>(&'a self, tag: u32, whole: Option<&'a [u8]>) -> Result<Option<Found<'a>>> {
        let Some(entry) = self.layout.find(tag) else {
            return Ok(None);
        };
        if entry.is_pixels() || entry.length == UNDEFINED {
            return Ok(None);
        }
        let value = match &self.held {
            Held::Callers => whole
                .and_then(|whole| cut(whole, 0, entry))
                .map(Cow::Borrowed),
            Held::Inflated(whole) => cut(whole, 0, entry).map(Cow::Borrowed),
            Held::Windows { path, parts } => {
                match parts
                    .iter()
                    .find_map(|part| cut(&part.bytes, part.offset, entry))
                {
                    Some(value) => Some(Cow::Borrowed(value)),
                    None => Some(Cow::Owned(read_value(path, entry)?)),
                }
            }
        };
        match value {
            Some(value) => Ok(Some((entry, value))),
            None => Err(Error::invalid_at(
                tag,
                "expected the object that was scanned",
            )),
        }
    }
}

/// The value of `entry` if it lies within `bytes`, which start at `offset` of the object.
fn cut<'a>(bytes: &'a [u8], offset: u64, entry: &Entry) -> Option<&'a [u8]> {
    let start = usize::try_from(entry.offset.checked_sub(offset)?).ok()?;
    bytes.get(start..start.checked_add(entry.length as usize)?)
}

fn read_value(path: &Path, entry: &Entry) -> Result<Vec<u8>> {
    let (file, stamp) = source::open(path)?;
    let gone = |found: u64| {
        let expected = entry.length;
        Error::invalid_at(
            entry.tag,
            format!("expected {expected} bytes, found {found} in the file"),
        )
    };
    let left = stamp.size.saturating_sub(entry.offset);
    if left < u64::from(entry.length) {
        return Err(gone(left));
    }
    let mut value = vec![0; entry.length as usize];
    let found = source::read_at(&file, path, entry.offset, &mut value)?;
    if found < value.len() {
        return Err(gone(found as u64));
    }
    Ok(value)
}

/// Scan one object; with `transfer_syntax` it is a bare dataset in that syntax.
///
/// Errors: [`Error::InvalidDicom`] for what is not DICOM, truncated, contradictory or nested too
/// deep; [`Error::Io`].
pub fn scan(source: Source<'_>, transfer_syntax: Option<&str>) -> Result<Header> {
    thread_local! {
        // A fresh buffer for each of many small files costs more than reading them.
        static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    }
    let mut buffer = BUFFER.take();
    let header = scan_with(source, transfer_syntax, &mut buffer, |layout, kept| {
        let held = match kept {
            Kept::Whole(_) => Held::Callers,
            Kept::Inflated(bytes) => Held::Inflated(bytes),
            Kept::Windows(windows) => {
                let end = layout.pixels().map_or(u64::MAX, |entry| entry.offset);
                Held::Windows {
                    path: windows.path.to_path_buf(),
                    parts: windows.parts(end),
                }
            }
        };
        Ok(Header { layout, held })
    });
    if buffer.len() <= MAX_STEP {
        BUFFER.set(buffer);
    }
    header
}

/// Whether a file starts like a DICOM object: the Part 10 prefix, or a plausible first element.
pub fn is_dicom(path: &Path) -> Result<bool> {
    let (file, stamp) = source::open(path)?;
    let mut start = [0; 132];
    let found = source::read_at(&file, path, 0, &mut start)?;
    let start = start.get(..found).unwrap_or_default();
    Ok(start.get(128..132) == Some(b"DICM")
        || start.starts_with(b"DICM")
        || guess(start, stamp.size).is_some())
}

/// What a scan knows besides the layout, while its source is at hand.
pub(crate) enum Kept<'a> {
    Whole(&'a [u8]),
    Windows(&'a Windows<'a>),
    Inflated(Vec<u8>),
}

impl Kept<'_> {
    /// The state of the file that was scanned and that its values still have to be read from.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        match self {
            Kept::Windows(windows) => Some(windows.stamp),
            Kept::Whole(_) | Kept::Inflated(_) => None,
        }
    }

    /// The value of an element if it is in memory; long values of files are not.
    pub(crate) fn value(&self, entry: &Entry) -> Option<&[u8]> {
        match self {
            Kept::Whole(whole) => cut(whole, 0, entry),
            Kept::Inflated(whole) => cut(whole, 0, entry),
            Kept::Windows(windows) => windows.value(entry),
        }
    }
}

/// Scan one object and hand the outcome to `then`; `buffer` is reused from file to file.
pub(crate) fn scan_with<R>(
    source: Source<'_>,
    transfer_syntax: Option<&str>,
    buffer: &mut Vec<u8>,
    then: impl FnOnce(Layout, Kept<'_>) -> Result<R>,
) -> Result<R> {
    match source {
        Source::Bytes(bytes) => {
            let mut input = bytes;
            let (layout, inflated) = scan_input(&mut input, transfer_syntax)?;
            then(layout, inflated.map_or(Kept::Whole(bytes), Kept::Inflated))
        }
        Source::File(path) => {
            let mut windows = Windows::open(path, std::mem::take(buffer))?;
            let outcome = scan_input(&mut windows, transfer_syntax);
            let outcome = outcome.and_then(|(layout, inflated)| match inflated {
                Some(bytes) => then(layout, Kept::Inflated(bytes)),
                None => then(layout, Kept::Windows(&windows)),
            });
            *buffer = windows.buffer;
            outcome
        }
    }
}

/// Random access to an object, for a reader that mostly moves forward.
pub(crate) trait Input {
    fn size(&self) -> u64;
    /// `length` bytes at `offset`; the caller checked that they lie within `size`.
    fn bytes(&mut self, offset: u64, length: usize) -> Result<&[u8]>;
    /// Eight bytes at `offset`, without keeping what lies around them.
    fn eight(&mut self, offset: u64) -> Result<[u8; 8]>;
    /// The value of an element if it is in memory.
    fn value(&self, entry: &Entry) -> Option<&[u8]>;
}

impl Input for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn bytes(&mut self, offset: u64, length: usize) -> Result<&[u8]> {
        let start = usize::try_from(offset).map_err(|_| ended(offset))?;
        let end = start.checked_add(length).ok_or_else(|| ended(offset))?;
        self.get(start..end).ok_or_else(|| ended(offset))
    }

    fn eight(&mut self, offset: u64) -> Result<[u8; 8]> {
        self.bytes(offset, 8)?.try_into().map_err(|_| ended(offset))
    }

    fn value(&self, entry: &Entry) -> Option<&[u8]> {
        cut(self, 0, entry)
    }
}

/// The parts of a file that were read.
pub(crate) struct Windows<'a> {
    path: &'a Path,
    file: File,
    stamp: Stamp,
    /// The current window is the first `have` bytes of `buffer`; it starts at `base`.
    base: u64,
    have: usize,
    buffer: Vec<u8>,
    past: Vec<Part>,
}

impl<'a> Windows<'a> {
    fn open(path: &'a Path, buffer: Vec<u8>) -> Result<Self> {
        let (file, stamp) = source::open(path)?;
        let mut windows = Windows {
            path,
            file,
            stamp,
            base: 0,
            have: 0,
            buffer,
            past: Vec::new(),
        };
        windows.grow(FIRST_READ)?;
        Ok(windows)
    }

    /// Make the current window at least `length` long, or as long as the file allows.
    fn grow(&mut self, length: usize) -> Result<()> {
        let left = usize::try_from(self.stamp.size - self.base).unwrap_or(usize::MAX);
        let length = length.min(left);
        if self.buffer.len() < length {
            let more = length - self.buffer.len();
            self.buffer
                .try_reserve_exact(more)
                .map_err(|_| Error::invalid(format!("no memory for a header of {length} bytes")))?;
            self.buffer.resize(length, 0);
        }
        let offset = self.base + self.have as u64;
        if let Some(into) = self.buffer.get_mut(self.have..length) {
            self.have += source::read_at(&self.file, self.path, offset, into)?;
        }
        Ok(())
    }

    fn parts(&self, end: u64) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::with_capacity(self.past.len() + 1);
        let past = self
            .past
            .iter()
            .map(|part| (part.offset, part.bytes.as_slice()));
        let current = (self.base, self.buffer.get(..self.have).unwrap_or_default());
        for (offset, bytes) in past.chain([current]) {
            let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
            let bytes = bytes.get(..length.min(bytes.len())).unwrap_or_default();
            parts.push(Part {
                offset,
                bytes: bytes.to_vec(),
            });
        }
        parts
    }
}

impl Input for Windows<'_> {
    fn size(&self) -> u64 {
        self.stamp.size
    }

    fn bytes(&mut self, offset: u64, length: usize) -> Result<&[u8]> {
        let end = self.base + self.have as u64;
        if offset > end {
            let bytes = self.buffer.get(..self.have).unwrap_or_default().to_vec();
            self.past.push(Part {
                offset: self.base,
                bytes,
            });
            self.base = offset;
            self.have = 0;
            self.grow(length.max(NEXT_READ))?;
        }
        let start = offset
            .checked_sub(self.base)
            .and_then(|n| usize::try_from(n).ok());
        let start = start.ok_or_else(|| ended(offset))?;
        let stop = start.checked_add(length).ok_or_else(|| ended(offset))?;
        if stop > self.have {
            self.grow(stop.max(self.have + self.have.saturating_mul(3).min(MAX_STEP)))?;
        }
        let have = self.buffer.get(..self.have).unwrap_or_default();
        have.get(start..stop).ok_or_else(|| ended(offset))
    }

    fn eight(&mut self, offset: u64) -> Result<[u8; 8]> {
        let mut eight = [0; 8];
        let start = offset
            .checked_sub(self.base)
            .and_then(|n| usize::try_from(n).ok());
        let have = self.buffer.get(..self.have).unwrap_or_default();
        match start.and_then(|start| have.get(start..start.checked_add(8)?)) {
            Some(bytes) => eight.copy_from_slice(bytes),
            None => {
                let found = source::read_at(&self.file, self.path, offset, &mut eight)?;
                if found < eight.len() {
                    return Err(ended(offset));
                }
            }
        }
        Ok(eight)
    }

    fn value(&self, entry: &Entry) -> Option<&[u8]> {
        let current = self.buffer.get(..self.have).unwrap_or_default();
        cut(current, self.base, entry).or_else(|| {
            self.past
                .iter()
                .find_map(|part| cut(&part.bytes, part.offset, entry))
        })
    }
}

/// Scan, and inflate first where the syntax asks for it.
fn scan_input<I: Input>(
    input: &mut I,
    transfer_syntax: Option<&str>,
) -> Result<(Layout, Option<Vec<u8>>)> {
    let mut layout = Layout {
        entries: Vec::with_capacity(192),
        ..Layout::default()
    };
    let start = match transfer_syntax {
        Some(uid) => bare(input, uid, &mut layout),
        None => meta(input, &mut layout),
    };
    let (offset, mut syntax) = start.map_err(|error| named(error, &layout, input))?;
    let inflated = if syntax.deflated {
        let whole = inflated(input, offset).map_err(|error| named(error, &layout, input))?;
        walk(&mut whole.as_slice(), offset, syntax.encoding, &mut layout)?;
        Some(whole)
    } else {
        syntax.encoding = observed(input, offset, syntax.encoding)?;
        walk(input, offset, syntax.encoding, &mut layout)?;
        None
    };
    if layout.entries.is_empty() {
        return Err(Error::invalid("expected a dataset, found no element"));
    }
    layout.encoding = Some(syntax.encoding);
    layout.big_endian = syntax.encoding.big;
    layout.big_pixels = syntax.big_pixels;
    layout.native = syntax.native;
    layout.sort();
    Ok((layout, inflated))
}

fn walk<I: Input>(
    input: &mut I,
    offset: u64,
    encoding: Encoding,
    layout: &mut Layout,
) -> Result<()> {
    Walk::new(input, encoding)
        .top(offset, layout)
        .map_err(|error| named(error, layout, input))
}

/// Name the object in an error, as far as it was read.
fn named<I: Input>(error: Error, layout: &Layout, input: &I) -> Error {
    let uid = |tag| {
        let entry = layout.entries.iter().find(|entry| entry.tag == tag)?;
        let value = input.value(entry)?;
        let text = std::str::from_utf8(value).ok()?.trim_matches(['\0', ' ']);
        (!text.is_empty()).then(|| text.to_owned())
    };
    match uid(0x0008_0018).or_else(|| uid(0x0002_0003)) {
        Some(uid) => error.of(&uid),
        None => error,
    }
}

/// The start of a bare dataset whose syntax is known from elsewhere (PS3.7 section 6.3.1).
fn bare<I: Input>(input: &I, uid: &str, layout: &mut Layout) -> Result<(u64, Syntax)> {
    if input.size() == 0 {
        return Err(Error::invalid("expected a dataset, found no bytes"));
    }
    layout.transfer_syntax = uid.trim_matches(['\0', ' ']).to_owned();
    Ok((0, syntax(&layout.transfer_syntax)))
}

/// Read the File Meta Information if there is any (PS3.10 section 7.1); where the dataset starts.
///
/// The meta information ends where the group is no longer 0002, whatever its group length says.
fn meta<I: Input>(input: &mut I, layout: &mut Layout) -> Result<(u64, Syntax)> {
    let size = input.size();
    let mut offset = 0;
    let mut prefixed = false;
    for start in [128, 0] {
        if size >= start + 4 && input.bytes(start, 4)? == b"DICM" {
            (offset, prefixed) = (start + 4, true);
            break;
        }
    }
    if !prefixed {
        let start = input.bytes(0, size.min(16) as usize)?;
        if guess(start, size).is_none() {
            return Err(Error::invalid(
                "expected a DICOM object, found neither the DICM prefix nor a plausible first element",
            ));
        }
    }
    let mut declared_end = None;
    while size - offset >= 8 {
        let header = input.bytes(offset, 8)?;
        if le16(header, 0) != 2 {
            break;
        }
        let deflated = syntax(&layout.transfer_syntax).deflated;
        if deflated && declared_end == Some(offset) {
            break;
        }
        // Explicit VR as the standard has it, implicit VR as some writers do.
        let implicit = !is_vr(header, 4);
        let encoding = Encoding {
            implicit,
            big: false,
        };
        let entry = element(input, offset, size, encoding)?;
        if entry.length == UNDEFINED {
            return Err(Error::invalid_at(
                entry.tag,
                "expected a defined length in group 0002",
            ));
        }
        keep(input, &entry)?;
        layout.push(entry)?;
        offset = entry.offset + u64::from(entry.length);
        match (entry.tag, input.value(&entry)) {
            (0x0002_0000, Some(value)) if value.len() == 4 => {
                declared_end = offset.checked_add(u64::from(le32(value, 0)));
            }
            (0x0002_0010, Some(value)) => {
                let text: String = value.iter().map(|byte| char::from(*byte)).collect();
                layout.transfer_syntax = text.trim_matches(['\0', ' ']).to_owned();
            }
            _ => {}
        }
    }
    if layout.transfer_syntax.is_empty() {
        let start = input.bytes(offset, (size - offset).min(16) as usize)?;
        // The default transfer syntax where nothing speaks for another (PS3.5 section 10.1).
        let found = guess(start, size - offset).unwrap_or(Encoding {
            implicit: true,
            big: false,
        });
        layout.transfer_syntax = match found {
            Encoding { implicit: true, .. } => IMPLICIT_LITTLE,
            Encoding { big: true, .. } => EXPLICIT_BIG,
            _ => EXPLICIT_LITTLE,
        }
        .to_owned();
    }
    Ok((offset, syntax(&layout.transfer_syntax)))
}

/// The encoding of a dataset by its first element, if that looks like one.
fn guess(start: &[u8], size: u64) -> Option<Encoding> {
    if start.len() < 8 {
        return None;
    }
    let plausible = |group: u16| group != 0 && group.is_multiple_of(2) && group < 0x0100;
    let little = plausible(le16(start, 0));
    if is_vr(start, 4) {
        let big = plausible(u16::from_be_bytes([start[0], start[1]]));
        return (little || big).then_some(Encoding {
            implicit: false,
            big: !little,
        });
    }
    let length = le32(start, 4);
    let fits = length == UNDEFINED || u64::from(length) <= size - 8;
    (little && fits).then_some(Encoding {
        implicit: true,
        big: false,
    })
}

/// A dataset that claims Implicit VR and starts with a VR is explicit; such writers exist.
fn observed<I: Input>(input: &mut I, offset: u64, claimed: Encoding) -> Result<Encoding> {
    if claimed.implicit && input.size() - offset >= 8 {
        let header = input.bytes(offset, 8)?;
        if is_vr(header, 4) && le16(header, 0) < 0x0100 {
            return Ok(Encoding {
                implicit: false,
                big: false,
            });
        }
    }
    Ok(claimed)
}

/// The object with its deflated part inflated (PS3.5 section A.5), so that offsets are in one space.
fn inflated<I: Input>(input: &mut I, offset: u64) -> Result<Vec<u8>> {
    let size = usize::try_from(input.size()).unwrap_or(usize::MAX);
    if size > MAX_INFLATED {
        return Err(Error::invalid(format!(
            "expected at most {MAX_INFLATED} deflated bytes, found {size}"
        )));
    }
    let whole = input.bytes(0, size)?;
    let start = usize::try_from(offset).map_err(|_| ended(offset))?;
    let (meta, deflated) = whole.split_at_checked(start).ok_or_else(|| ended(offset))?;
    // Raw, as the standard has it; then with a zlib header, as some writers do.
    inflate(meta, deflated, false).or_else(|error| match deflated.first() {
        Some(byte) if byte & 0x0F == 8 => inflate(meta, deflated, true),
        _ => Err(error),
    })
}

fn inflate(meta: &[u8], deflated: &[u8], zlib: bool) -> Result<Vec<u8>> {
    let limit = MAX_INFLATED.min(deflated.len().saturating_mul(MAX_RATIO));
    let mut out = Vec::new();
    let reserve = |out: &mut Vec<u8>, more: usize| {
        out.try_reserve(more)
            .map_err(|_| Error::invalid("no memory to inflate the dataset"))
    };
    reserve(
        &mut out,
        meta.len() + deflated.len().saturating_mul(4).clamp(4096, 64 << 20),
    )?;
    out.extend_from_slice(meta);
    let mut machine = Decompress::new(zlib);
    loop {
        let rest = usize::try_from(machine.total_in())
            .ok()
            .and_then(|n| deflated.get(n..));
        let before = (machine.total_in(), out.len());
        let status = machine
            .decompress_vec(rest.unwrap_or_default(), &mut out, FlushDecompress::None)
            .map_err(|_| Error::invalid("expected a deflated dataset, found other bytes"))?;
        if out.len() - meta.len() > limit {
            return Err(Error::invalid(format!(
                "expected a deflated dataset of at most {limit} bytes, found more"
            )));
        }
        match status {
            Status::StreamEnd => return Ok(out),
            _ if out.len() == out.capacity() => {
                let more = out.len().min(limit + meta.len() + 1 - out.len()).max(1);
                reserve(&mut out, more)?;
            }
            _ if before == (machine.total_in(), out.len()) => {
                return Err(Error::invalid(
                    "expected the end of the deflated dataset, found none",
                ));
            }
            _ => {}
        }
    }
}

/// Make sure that a short value can be read afterwards.
fn keep<I: Input>(input: &mut I, entry: &Entry) -> Result<()> {
    if entry.length <= KEEP && entry.length > 0 && !entry.is_pixels() {
        input.bytes(entry.offset, entry.length as usize)?;
    }
    Ok(())
}

/// The header of one element whose first byte is at `offset` and whose value ends by `limit`.
pub(crate) fn element<I: Input>(
    input: &mut I,
    offset: u64,
    limit: u64,
    encoding: Encoding,
) -> Result<Entry> {
    let left = limit - offset;
    let header = input.bytes(offset, left.min(12) as usize)?;
    let tag = encoding.tag(header);
    let entry = |vr: [u8; 2], length: u32, skip: u64| {
        let entry = Entry {
            tag,
            vr,
            length,
            offset: offset + skip,
        };
        let fits = length == UNDEFINED || u64::from(length) <= left - skip;
        if fits { Ok(entry) } else { Err(entry) }
    };
    let implicit = || entry([0, 0], encoding.u32(header, 4), 8);
    let vr = [header[4], header[5]];
    let long = || match header.len() {
        12 => entry(vr, encoding.u32(header, 8), 12),
        _ => Err(Entry {
            tag,
            vr,
            length: 4,
            offset: offset + 8,
        }),
    };
    let short = || entry(vr, u32::from(encoding.u16(header, 6)), 8);
    let known = || if is_long(vr) { long() } else { short() };
    let found = if tag >> 16 == 0xFFFE {
        implicit()
    } else if encoding.implicit {
        match implicit() {
            Err(_) if is_vr(header, 4) => known(),
            other => other,
        }
    } else if is_vr(header, 4) {
        known()
    } else if vr.iter().all(u8::is_ascii_uppercase) {
        // A VR newer than this table has the long form (PS3.5 section 6.2); older writers' own
        // inventions have the short one.
        let newer = if encoding.u16(header, 6) == 0 {
            long()
        } else {
            short()
        };
        newer.or_else(|_| short()).or_else(|_| implicit())
    } else {
        implicit()
    };
    found.map_err(|entry| {
        let left = limit.saturating_sub(entry.offset);
        let length = entry.length;
        Error::invalid_at(
            tag,
            format!("expected a value of {length} bytes, found {left} left"),
        )
    })
}

/// What the walk is inside of.
struct Frame {
    /// The sequence or the element with the item.
    tag: u32,
    is_item: bool,
    /// Where it must have ended: its own end if `defined`, else its parent's.
    end: u64,
    defined: bool,
    encoding: Encoding,
}

/// One pass over the elements of a dataset.
struct Walk<'a, I: Input> {
    input: &'a mut I,
    encoding: Encoding,
    frames: Vec<Frame>,
    /// How many frames, and where to go on, if what lies inside them is malformed.
    retreat: Option<(usize, u64)>,
    items: usize,
    nested: usize,
}

/// Malformed nested content, which a retreat may skip, or the end of the scan.
enum Stop {
    Malformed(Error),
    Final(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidDicom(_) => Stop::Malformed(error),
            other => Stop::Final(other),
        }
    }
}

impl<'a, I: Input> Walk<'a, I> {
    fn new(input: &'a mut I, encoding: Encoding) -> Self {
        Walk {
            input,
            encoding,
            frames: Vec::new(),
            retreat: None,
            items: 0,
            nested: 0,
        }
    }

    /// The top level, from `offset` to the pixel data or the end.
    fn top(mut self, mut offset: u64, layout: &mut Layout) -> Result<()> {
        let size = self.input.size();
        while offset < size {
            if size - offset < 8 {
                // Zero padding is harmless; anything else is the start of an element that was cut.
                let rest = self.input.bytes(offset, (size - offset) as usize)?;
                if rest.iter().any(|byte| *byte != 0) {
                    return Err(Error::invalid(format!(
                        "expected an element at offset {offset}, found {} bytes",
                        rest.len()
                    )));
                }
                break;
            }
            let entry = element(self.input, offset, size, self.encoding)?;
            match entry.tag {
                SEQUENCE_DELIMITER | ITEM_DELIMITER if entry.length == 0 => {
                    self.count_item(entry.tag)?;
                    offset += 8;
                    continue;
                }
                tag if matches!(tag >> 16, 0 | 0xFFFE) => {
                    return Err(Error::invalid_at(
                        tag,
                        format!(
                            "expected an element of the dataset at offset {offset}, found this"
                        ),
                    ));
                }
                _ => {}
            }
            layout.push(entry)?;
            if entry.is_pixels() {
                let end = if entry.length == UNDEFINED {
                    self.fragments(&entry, size, true)?
                } else {
                    entry.offset + u64::from(entry.length)
                };
                return self.behind(&entry, end, size);
            }
            keep(self.input, &entry)?;
            offset = self.value(&entry, size)?;
        }
        Ok(())
    }

    /// What follows the pixel data, from `offset` on: nothing that a header tells (PS3.5 section 7.1).
    ///
    /// Other readers take a second patient or slope that comes there for the right one.
    fn behind(&mut self, pixels: &Entry, mut offset: u64, size: u64) -> Result<()> {
        while size - offset >= 8 {
            let start = self.input.eight(offset)?;
            if start == [0; 8] {
                // Padding.
                return Ok(());
            }
            let entry = element(self.input, offset, size, self.encoding)?;
            if entry.tag <= pixels.tag {
                let message = format!(
                    "expected none of the header's elements after the pixel data, found this at \
                     offset {offset}"
                );
                return Err(Error::invalid_at(entry.tag, message));
            }
            offset = self.value(&entry, size)?;
        }
        Ok(())
    }

    /// Pass over the value of a top-level element, sequences included; where it ends.
    fn value(&mut self, entry: &Entry, size: u64) -> Result<u64> {
        let mut offset = match self.enter(entry, size, self.encoding) {
            Ok(offset) => offset,
            Err(Stop::Malformed(error) | Stop::Final(error)) => return Err(error),
        };
        while !self.frames.is_empty() {
            match self.step(offset) {
                Ok(next) => offset = next,
                Err(Stop::Malformed(error)) => match self.retreat.take() {
                    Some((depth, end)) => {
                        self.frames.truncate(depth);
                        offset = end;
                    }
                    None => return Err(error.at(entry.tag)),
                },
                Err(Stop::Final(error)) => return Err(error),
            }
            if self
                .retreat
                .is_some_and(|(depth, _)| self.frames.len() <= depth)
            {
                self.retreat = None;
            }
        }
        Ok(offset)
    }

    /// One element, item or delimiter within sequences; where the next one is.
    fn step(&mut self, offset: u64) -> std::result::Result<u64, Stop> {
        let Some(frame) = self.frames.last() else {
            return Ok(offset);
        };
        let (tag, end, encoding) = (frame.tag, frame.end, frame.encoding);
        let (is_item, defined) = (frame.is_item, frame.defined);
        if defined && offset == end {
            self.frames.pop();
            return Ok(offset);
        }
        let what = if is_item { "item" } else { "sequence" };
        if end - offset < 8 {
            let found = end - offset;
            let message = format!("expected the {what} to end or go on, found {found} bytes");
            return Err(Error::invalid_at(tag, message).into());
        }
        let wrong = |found: u32| {
            let (group, element) = (found >> 16, found & 0xFFFF);
            let expected = if is_item { "an element" } else { "an item" };
            let message = format!("expected {expected}, found ({group:04X},{element:04X})");
            Stop::from(Error::invalid_at(tag, message))
        };
        if !is_item {
            let found = encoding.tag(self.input.bytes(offset, 8)?);
            if found >> 16 != 0xFFFE {
                return Err(wrong(found));
            }
        }
        let entry = element(self.input, offset, end, encoding).map_err(|error| error.at(tag))?;
        match (entry.tag, is_item) {
            // A delimiter of its own kind closes; behind a defined length it is superfluous.
            (ITEM_DELIMITER, true) | (SEQUENCE_DELIMITER, false) => {
                self.frames.pop();
                Ok(if defined { end } else { offset + 8 })
            }
            (ITEM_DELIMITER, false) if entry.length == 0 => {
                self.count_item(tag).map_err(Stop::Final)?;
                Ok(offset + 8)
            }
            (ITEM, false) => {
                self.count_item(tag).map_err(Stop::Final)?;
                let defined = entry.length != UNDEFINED;
                let end = if defined {
                    entry.offset + u64::from(entry.length)
                } else {
                    end
                };
                self.frames.push(Frame {
                    tag,
                    is_item: true,
                    end,
                    defined,
                    encoding,
                });
                Ok(entry.offset)
            }
            (found, true) if found >> 16 != 0xFFFE => {
                self.nested += 1;
                if self.nested > MAX_NESTED {
                    return Err(Stop::Final(Error::invalid_at(
                        tag,
                        format!("expected at most {MAX_NESTED} elements in sequences, found more"),
                    )));
                }
                self.enter(&entry, end, encoding)
            }
            (found, _) => Err(wrong(found)),
        }
    }

    /// Enter a sequence, or pass over another value; where to go on.
    fn enter(
        &mut self,
        entry: &Entry,
        limit: u64,
        encoding: Encoding,
    ) -> std::result::Result<u64, Stop> {
        let Entry {
            tag,
            vr,
            length,
            offset,
        } = *entry;
        let unknown = &vr == b"UN";
        // The content of UN is Implicit VR Little Endian (PS3.5 section 6.2.2).
        let inner = if unknown {
            Encoding {
                implicit: true,
                big: false,
            }
        } else {
            encoding
        };
        if length == UNDEFINED {
            let is_sequence = match &vr {
                b"SQ" | b"UN" => true,
                [0, 0] => !is_pixels(tag),
                [b'O', _] => false,
                _ => {
                    let message = format!("expected a defined length of a {} value", entry.vr());
                    return Err(Error::invalid_at(tag, message).into());
                }
            };
            if is_sequence {
                self.push(tag, limit, false, inner)?;
                return Ok(offset);
            }
            return self.fragments(entry, limit, false);
        }
        let end = offset + u64::from(length);
        let sequence = match &vr {
            b"SQ" => length > 0,
            b"UN" | [0, 0] if length >= 8 => {
                starts_with_item(&self.input.eight(offset)?, inner.big)
            }
            _ => false,
        };
        if !sequence {
            return Ok(end);
        }
        // Only a standard sequence that calls itself one is bound to be well-formed.
        let private = (tag >> 16) % 2 == 1;
        if (&vr != b"SQ" || private) && self.retreat.is_none() {
            self.retreat = Some((self.frames.len(), end));
        }
        self.push(tag, end, true, inner)?;
        Ok(offset)
    }

    fn push(
        &mut self,
        tag: u32,
        end: u64,
        defined: bool,
        encoding: Encoding,
    ) -> std::result::Result<(), Stop> {
        // Every second frame is an item.
        if self.frames.len() / 2 >= MAX_DEPTH {
            return Err(Stop::Final(Error::invalid_at(
                tag,
                format!("expected sequences at most {MAX_DEPTH} deep, found deeper"),
            )));
        }
        self.frames.push(Frame {
            tag,
            is_item: false,
            end,
            defined,
            encoding,
        });
        Ok(())
    }

    /// Pass over the fragments of encapsulated pixel data (PS3.5 section A.4); where they end.
    ///
    /// `may_end` tolerates a missing delimiter exactly at the end.
    fn fragments(
        &mut self,
        entry: &Entry,
        limit: u64,
        may_end: bool,
    ) -> std::result::Result<u64, Stop> {
        let encoding = self.encoding;
        let mut offset = entry.offset;
        let mut count = 0_u64;
        loop {
            if offset == limit && may_end && count > 0 {
                return Ok(offset);
            }
            if limit - offset < 8 {
                let found = limit - offset;
                let message = format!("expected fragments to end or go on, found {found} bytes");
                return Err(Error::invalid_at(entry.tag, message).into());
            }
            let header = self.input.eight(offset)?;
            let tag = encoding.tag(&header);
            let length = u64::from(encoding.u32(&header, 4));
            offset += 8;
            if tag == SEQUENCE_DELIMITER {
                return Ok(offset);
            }
            if tag != ITEM {
                let (group, element) = (tag >> 16, tag & 0xFFFF);
                let message = format!("expected a fragment, found ({group:04X},{element:04X})");
                return Err(Error::invalid_at(entry.tag, message).into());
            }
            if length > limit - offset {
                let left = limit - offset;
                let message = format!("expected a fragment of {length} bytes, found {left} left");
                return Err(Error::invalid_at(entry.tag, message).into());
            }
            self.count_item(entry.tag).map_err(Stop::Final)?;
            count += 1;
            offset += length;
        }
    }

    fn count_item(&mut self, tag: u32) -> Result<()> {
        self.items += 1;
        if self.items > MAX_ITEMS {
            return Err(Error::invalid_at(
                tag,
                format!("expected at most {MAX_ITEMS} items, found more"),
            ));
        }
        Ok(())
    }
}

impl From<Stop> for Error {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Malformed(error) | Stop::Final(error) => error,
        }
    }
}

fn starts_with_item(start: &[u8; 8], big: bool) -> bool {
    if big {
        start.starts_with(b"\xFF\xFE\xE0\x00")
    } else {
        start.starts_with(b"\xFE\xFF\x00\xE0")
    }
}

/// Whether two bytes are a VR of PS3.5 section 6.2.
fn is_vr(bytes: &[u8], at: usize) -> bool {
    let vr: Option<[u8; 2]> = bytes.get(at..at + 2).and_then(|vr| vr.try_into().ok());
    vr.is_some_and(|vr| of_kind(vr, &SHORT) || of_kind(vr, &LONG))
}

/// Whether a VR has two reserved bytes and a 32 bit length (PS3.5 section 7.1.2).
fn is_long(vr: [u8; 2]) -> bool {
    of_kind(vr, &LONG)
}

/// For each first letter, the second letters as bits.
type Letters = [u32; 26];

static SHORT: Letters = letters(&[
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN",
    b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
]);

static LONG: Letters = letters(&[
    b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV",
]);

const fn letters(vrs: &[&[u8; 2]]) -> Letters {
    let mut letters = [0; 26];
    let mut i = 0;
    while i < vrs.len() {
        letters[(vrs[i][0] - b'A') as usize] |= 1 << (vrs[i][1] - b'A');
        i += 1;
    }
    letters
}

fn of_kind([first, second]: [u8; 2], letters: &Letters) -> bool {
    let second = second.wrapping_sub(b'A');
    let seconds = letters
        .get(usize::from(first.wrapping_sub(b'A')))
        .copied()
        .unwrap_or(0);
    second < 26 && seconds >> second & 1 == 1
}

// The four readers are only called on headers of at least eight bytes; beyond them they give 0.
fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_be_bytes)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

#[cfg(test)]
mod tests;
