//! Functional groups: where each frame of an enhanced object lies and what its values mean.
//!
//! The problem: an enhanced CT, MR or PET tells geometry and rescale not once, but in sequences that
//! all frames share (5200,9229) and in one item for each frame (5200,9230), which may lie in any
//! order (PS3.3 C.7.6.16). What the frame's own item says counts more than what is shared, and both
//! more than the top level.

use crate::error::{Error, Result};
use crate::image::{Extra, Image, decimals};
use crate::pixels::Lut;
use crate::scan::{Encoding, Entry, UNDEFINED, element};
use crate::source::Opened;

pub(crate) const SHARED: u32 = 0x5200_9229;
pub(crate) const PER_FRAME: u32 = 0x5200_9230;
pub(crate) const DIMENSIONS: u32 = 0x0020_9222;

const ITEM: u32 = 0xFFFE_E000;
const ITEM_DELIMITER: u32 = 0xFFFE_E00D;
const SEQUENCE_DELIMITER: u32 = 0xFFFE_E0DD;
/// Deepest nesting of sequences inside functional groups.
const MAX_DEPTH: usize = 16;
/// Most bytes of the functional groups of one object.
const MAX_BYTES: u64 = 1 << 28;

/// Most bytes that are looked at for the Dimension Index Sequence.
const MAX_DIMENSIONS: u64 = 1 << 16;
/// Sequences that tell of other images: Referenced Image, Derivation Image.
const OF_OTHERS: [u32; 2] = [0x0008_1140, 0x0008_9124];

/// A part of the bytes: an item, or the value of an element.
type Span = std::ops::Range<usize>;

/// The images of all frames of an object, in the order of the file.
///
/// `groups` are the two sequences and `dimensions` is the Dimension Index Sequence, where they are
/// present.
pub(crate) fn frames(
    image: &Image,
    source: &Opened<'_>,
    encoding: Encoding,
    groups: [Option<Entry>; 2],
    dimensions: Option<Entry>,
) -> Result<Vec<Image>> {
    let [shared, per_frame] = groups;
    // It only serves for a check, so one that cannot be understood counts as absent.
    let place = dimensions.and_then(|entry| position_dimension(image, source, encoding, &entry));
    let mut base = image.clone();
    if let Some(entry) = shared {
        let bytes = value(image, source, &entry)?;
        let reader = Reader {
            bytes: &bytes,
            encoding,
        };
        if let Some(item) = reader.items(entry.length)?.first() {
            reader.apply(item.clone(), place, &mut base)?;
        }
    }
    base.check_copies(source.size())?;
    let count = image.number_of_frames;
    let mut frames = Vec::new();
    if let Some(entry) = per_frame {
        let bytes = value(image, source, &entry)?;
        let reader = Reader {
            bytes: &bytes,
            encoding,
        };
        let items = reader.items(entry.length)?;
        if items.len() != count as usize {
            let found = items.len();
            return Err(Error::invalid_at(
                PER_FRAME,
                format!(
                    "expected an item for each of {count} frames (NumberOfFrames), found {found}"
                ),
            ));
        }
        for item in items {
            let mut frame = base.clone();
            reader.apply(item, place, &mut frame)?;
            frames.push(frame);
        }
    } else {
        frames.resize(count as usize, base);
    }
    for (number, frame) in (0..).zip(&mut frames) {
        frame.frame = number;
    }
    Ok(frames)
}

/// The table of a Modality LUT Sequence (PS3.3 C.11.1.1).
pub(crate) fn modality_lut(
    image: &Image,
    source: &Opened<'_>,
    encoding: Encoding,
    entry: Entry,
) -> Result<Lut> {
    let bytes = value(image, source, &entry)?;
    let reader = Reader {
        bytes: &bytes,
        encoding,
    };
    let wrong = |found: &str| {
        Error::invalid_at(
            entry.tag,
            format!("expected a Modality LUT with descriptor and data, found {found}"),
        )
    };
    let items = reader.items(entry.length)?;
    let [item] = items.as_slice() else {
        return Err(wrong(&format!("{} items", items.len())));
    };
    let descriptor = reader.value(item.clone(), 0x0028_3002)?;
    if descriptor.len() != 6 {
        return Err(wrong(&format!(
            "a descriptor of {} bytes",
            descriptor.len()
        )));
    }
    let count = match encoding.u16(descriptor, 0) {
        0 => 1 << 16,
        count => usize::from(count),
    };
    let first = encoding.u16(descriptor, 2);
    let first = if image.pixel_representation == 1 {
        i64::from(first.cast_signed())
    } else {
        i64::from(first)
    };
    let data = reader.value(item.clone(), 0x0028_3006)?;
    // Entries of 8 bits may be packed, two in a word.
    let is_packed = encoding.u16(descriptor, 4) == 8 && data.len() < 2 * count;
    let values: Vec<f64> = if !is_packed {
        let (entries, _) = data.as_chunks::<2>();
        let entries = entries.iter().take(count);
        entries
            .map(|entry| f64::from(encoding.u16(entry, 0)))
            .collect()
    } else {
        let swap = usize::from(encoding.is_big());
        let entries = (0..count).map_while(|k| data.get(k ^ swap));
        entries.map(|byte| f64::from(*byte)).collect()
    };
    if values.len() != count {
        let found = format!("{} bytes for {count} entries", data.len());
        return Err(wrong(&found));
    }
    Ok(Lut { first, values })
}

/// Which of the dimension indices is that of the position (PS3.3 C.7.6.17).
fn position_dimension(
    image: &Image,
    source: &Opened<'_>,
    encoding: Encoding,
    entry: &Entry,
) -> Option<usize> {
    let end = entry.offset.saturating_add(match entry.length {
        UNDEFINED => MAX_DIMENSIONS.min(image.pixel_offset.checked_sub(entry.offset)?),
        length => u64::from(length),
    });
    if end > source.size() || end - entry.offset > MAX_DIMENSIONS {
        return None;
    }
    let mut bytes = vec![0; (end - entry.offset) as usize];
    source.read(entry.offset, &mut bytes).ok()?;
    let reader = Reader {
        bytes: &bytes,
        encoding,
    };
    let items = reader.items(entry.length).ok()?;
    items.into_iter().position(|item| {
        let value = reader.value(item, 0x0020_9165).unwrap_or_default();
        value.len() == 4 && matches!(encoding.tag(value), 0x0020_0032 | 0x0020_9057)
    })
}

/// The bytes of a sequence: its own, or where its length is undefined all up to the pixel data.
fn value(image: &Image, source: &Opened<'_>, entry: &Entry) -> Result<Vec<u8>> {
    let end = match entry.length {
        UNDEFINED => image.pixel_offset,
        length => entry.offset + u64::from(length),
    };
    let length = end.saturating_sub(entry.offset);
    if length > MAX_BYTES || end > source.size() {
        return Err(Error::invalid_at(
            entry.tag,
            format!("expected functional groups of at most {MAX_BYTES} bytes, found {length}"),
        ));
    }
    let mut bytes = vec![0; length as usize];
    source.read(entry.offset, &mut bytes)?;
    Ok(bytes)
}

struct Reader<'a> {
    bytes: &'a [u8],
    encoding: Encoding,
}

impl Reader<'_> {
    /// The items of the sequence that all the bytes are.
    fn items(&self, length: u32) -> Result<Vec<Span>> {
        let mut items = Vec::new();
        self.sequence(0, length, self.encoding, 0, &mut |item| items.push(item))?;
        Ok(items)
    }

    /// Pass over a sequence whose value starts at `at`, and tell each item; where it ends.
    fn sequence(
        &self,
        mut at: usize,
        length: u32,
        encoding: Encoding,
        depth: usize,
        each: &mut dyn FnMut(Span),
    ) -> Result<usize> {
        if depth > MAX_DEPTH {
            return Err(Error::invalid("functional groups are nested too deep"));
        }
        let end = match length {
            UNDEFINED => self.bytes.len(),
            length => at.saturating_add(length as usize).min(self.bytes.len()),
        };
        while at < end {
            let entry = self.element(at, encoding)?;
            let start = at + 8;
            match entry.tag {
                SEQUENCE_DELIMITER => return Ok(start),
                ITEM if entry.length == UNDEFINED => {
                    let stop =
                        self.elements(start..self.bytes.len(), encoding, depth, &mut |_| Ok(()))?;
                    each(start..stop);
                    at = stop + 8;
                }
                ITEM => {
                    at = start + entry.length as usize;
                    each(start..at);
                }
                tag => {
                    return Err(Error::invalid_at(
                        tag,
                        "expected an item of functional groups, found this",
                    ));
                }
            }
        }
        Ok(end)
    }

    /// Tell each element of an item; where its delimiter is, or its end.
    fn elements(
        &self,
        item: Span,
        encoding: Encoding,
        depth: usize,
        each: &mut dyn FnMut(Entry) -> Result<()>,
    ) -> Result<usize> {
        let mut at = item.start;
        while at + 8 <= item.end {
            let entry = self.element(at, encoding)?;
            if entry.tag == ITEM_DELIMITER {
                return Ok(at);
            }
            each(entry)?;
            let start = entry.offset as usize;
            at = match entry.length {
                UNDEFINED => {
                    // The content of UN is Implicit VR Little Endian (PS3.5 section 6.2.2).
                    let inner = if entry.vr == *b"UN" {
                        Encoding::IMPLICIT
                    } else {
                        encoding
                    };
                    self.sequence(start, UNDEFINED, inner, depth + 1, &mut |_| {})?
                }
                length => start + length as usize,
            };
        }
        Ok(at.min(item.end))
    }

    fn element(&self, at: usize, encoding: Encoding) -> Result<Entry> {
        let size = self.bytes.len() as u64;
        if size.saturating_sub(at as u64) < 8 {
            return Err(Error::invalid("functional groups are cut off"));
        }
        element(&mut { self.bytes }, at as u64, size, encoding)
    }

    /// The first item of a sequence among the elements of an item.
    fn nested(&self, item: Span, tag: u32) -> Result<Option<Span>> {
        let mut found = None;
        self.elements(item, self.encoding, 0, &mut |entry| {
            if entry.tag == tag {
                found = Some(entry);
            }
            Ok(())
        })?;
        let Some(entry) = found else { return Ok(None) };
        let mut first = None;
        self.sequence(
            entry.offset as usize,
            entry.length,
            self.encoding,
            1,
            &mut |item| {
                first.get_or_insert(item);
            },
        )?;
        Ok(first)
    }

    fn value(&self, item: Span, tag: u32) -> Result<&[u8]> {
        let mut found = None;
        self.elements(item, self.encoding, 1, &mut |entry| {
            if entry.tag == tag && entry.length != UNDEFINED {
                found = Some(entry);
            }
            Ok(())
        })?;
        let span = found.map(|entry| {
            let start = entry.offset as usize;
            start..start + entry.length as usize
        });
        Ok(span
            .and_then(|span| self.bytes.get(span))
            .unwrap_or_default())
    }

    fn numbers<const N: usize>(&self, item: &Span, tag: u32) -> Result<Option<[f64; N]>> {
        let value = self.value(item.clone(), tag)?;
        decimals(value).map_err(|message| Error::invalid_at(tag, message))
    }

    /// Note the values of `wanted` in an item and the sequences in it: the one that lies highest, and
    /// of several the first.
    fn collect(
        &self,
        item: Span,
        encoding: Encoding,
        depth: usize,
        wanted: &[u32],
        found: &mut Vec<(usize, Extra)>,
    ) -> Result<()> {
        let mut sequences = Vec::new();
        self.elements(item, encoding, depth, &mut |entry| {
            let start = entry.offset as usize;
            if entry.length == UNDEFINED || entry.vr == *b"SQ" || entry.vr == [0, 0] {
                sequences.push(entry);
            }
            if entry.length != UNDEFINED
                && wanted.contains(&entry.tag)
                && let Some(value) = self.bytes.get(start..start + entry.length as usize)
                && !found
                    .iter()
                    .any(|(at, other)| other.tag == entry.tag && *at <= depth)
            {
                found.retain(|(_, other)| other.tag != entry.tag);
                let extra = Extra {
                    tag: entry.tag,
                    vr: entry.vr,
                    value: value.to_vec(),
                };
                found.push((depth, extra));
            }
            Ok(())
        })?;
        for entry in sequences {
            let start = entry.offset as usize;
            // Without a VR, a sequence is what starts with an item. A private one may say otherwise
            // than the public attributes, which count.
            let starts = self.bytes.get(start..start + 8).unwrap_or_default();
            let is_private = entry.tag >> 16 & 1 == 1;
            if is_private
                || OF_OTHERS.contains(&entry.tag)
                || starts.len() < 8
                || entry.length == 0
                || !matches!(encoding.tag(starts), ITEM | SEQUENCE_DELIMITER)
            {
                continue;
            }
            let inner = if entry.vr == *b"UN" {
                Encoding::IMPLICIT
            } else {
                encoding
            };
            let mut items = Vec::new();
            let walked = self.sequence(start, entry.length, inner, depth + 1, &mut |item| {
                items.push(item);
            });
            // What cannot be understood has no value; whoever needs one tells that it is missing.
            if walked.is_ok() {
                for item in items {
                    let _ = self.collect(item, inner, depth + 1, wanted, found);
                }
            }
        }
        Ok(())
    }

    /// Take from one item what it says of a frame; `place` is the dimension of the position.
    fn apply(&self, item: Span, place: Option<usize>, frame: &mut Image) -> Result<()> {
        if !frame.extra_tags.is_empty() {
            let mut found = Vec::new();
            let wanted = frame.extra_tags.clone();
            self.collect(item.clone(), self.encoding, 0, &wanted, &mut found)?;
            for (_, extra) in found {
                frame.extra.retain(|other| other.tag != extra.tag);
                frame.extra.push(extra);
            }
        }
        if let Some(plane) = self.nested(item.clone(), 0x0020_9113)? {
            frame.position = self.numbers(&plane, 0x0020_0032)?;
        }
        if let Some(plane) = self.nested(item.clone(), 0x0020_9116)? {
            frame.orientation = self.numbers(&plane, 0x0020_0037)?;
        }
        if let Some(measures) = self.nested(item.clone(), 0x0028_9110)? {
            let single = |found: Option<[f64; 1]>| found.map(|[number]| number);
            frame.pixel_spacing = self.numbers(&measures, 0x0028_0030)?;
            frame.slice_thickness = single(self.numbers(&measures, 0x0018_0050)?);
            frame.spacing_between_slices = single(self.numbers(&measures, 0x0018_0088)?);
        }
        if let Some(rescale) = self.nested(item.clone(), 0x0028_9145)? {
            let slope = self.numbers::<1>(&rescale, 0x0028_1053)?;
            let intercept = self.numbers::<1>(&rescale, 0x0028_1052)?;
            frame.has_rescale = slope.is_some() || intercept.is_some();
            frame.slope = slope.map_or(1.0, |[number]| number);
            frame.intercept = intercept.map_or(0.0, |[number]| number);
            let units = String::from_utf8_lossy(self.value(rescale, 0x0028_1054)?).into_owned();
            frame.units = units.trim_matches(['\0', ' ']).to_owned();
        }
        // CT, MR and PET Image Frame Type Sequence.
        for tag in [0x0018_9329, 0x0018_9226, 0x0018_9751] {
            if let Some(kind) = self.nested(item.clone(), tag)? {
                let value = self.value(kind, 0x0008_9007)?;
                if let Ok(text) = std::str::from_utf8(value)
                    && !text.trim_matches(['\0', ' ']).is_empty()
                {
                    text.trim_matches(['\0', ' '])
                        .clone_into(&mut frame.image_type);
                }
            }
        }
        if let Some(content) = self.nested(item, 0x0020_9111)? {
            let value = self.value(content.clone(), 0x0020_9056)?;
            let text = String::from_utf8_lossy(value);
            text.trim_matches(['\0', ' '])
                .clone_into(&mut frame.stack_id);
            let number = |value: &[u8], at: usize| {
                let number = value.get(4 * at..4 * at + 4)?;
                Some(self.encoding.u32(number, 0))
            };
            let indices = self.value(content.clone(), 0x0020_9157)?;
            let in_stack = self.value(content, 0x0020_9057)?;
            frame.position_index = place
                .and_then(|place| number(indices, place))
                .or_else(|| number(in_stack, 0));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{frames, scan_changed};
    use crate::source::Source;
    use crate::testing::{BIG, EXPLICIT, IMPLICIT, Writer, image};

    const ECHO_TIME: u32 = 0x0018_0081;
    const INDEX: u32 = 0x0020_9128;

    /// One frame that is the third of its stack, with an echo time at two depths.
    fn enhanced(syntax: &str, defined: bool, private: &[u8]) -> Vec<u8> {
        let new = || Writer::new(syntax);
        let number = |writer: Writer, tag, values: &[u32]| {
            let mut inner = new();
            values.iter().for_each(|value| inner.u32(*value));
            writer.put(tag, "UL", &inner.bytes)
        };
        let mut pointer = new();
        pointer.tag(0x0020_0032);
        let dimension = new().put(0x0020_9165, "AT", &pointer.bytes);
        let content = number(number(new(), INDEX, &[4]), 0x0020_9157, &[3]);
        let echo = new().text(ECHO_TIME, "DS", "2.5");
        let deeper = new().sequence(0x0018_9321, "SQ", &echo, defined);
        let others = new().text(ECHO_TIME, "DS", "9");
        let frame = new()
            .sequence(OF_OTHERS[0], "SQ", &others, defined)
            .sequence(0x0018_9114, "SQ", &deeper, defined)
            .sequence(0x0020_9111, "SQ", &content, defined)
            .put(0x2005_140F, "SQ", private);
        let groups = new().sequence(PER_FRAME, "SQ", &frame, defined);
        let plain = image(syntax);
        let at = plain.bytes.len() - 12 - if plain.implicit { 8 } else { 12 };
        let (head, pixels) = plain.bytes.split_at(at);
        let mut whole = new();
        whole.bytes = head.to_vec();
        let dimensions = new().sequence(DIMENSIONS, "SQ", &dimension, defined);
        // Not in the order of the tags, which no reader may depend on.
        whole.bytes.extend(dimensions.bytes);
        whole.bytes.extend(groups.bytes);
        whole.bytes.extend(pixels);
        whole.part10(syntax)
    }

    fn frames_of(source: Source<'_>, tags: &[u32]) -> Vec<Image> {
        let mut images = scan_changed(&[(source, None)], tags).unwrap();
        frames(&images.remove(0).unwrap(), source).unwrap()
    }

    #[test]
    fn values_are_found_at_any_depth_and_those_of_others_are_not() {
        for syntax in [EXPLICIT, IMPLICIT, BIG] {
            for defined in [true, false] {
                let bytes = enhanced(syntax, defined, b"");
                let source = Source::Bytes(&bytes);
                let tags = [ECHO_TIME, INDEX, 0x0008_0060];
                let found = frames_of(source, &tags);
                let [frame] = found.as_slice() else {
                    panic!("{} frames", found.len());
                };
                let value = |tag| {
                    let extra = frame.extra.iter().find(|extra| extra.tag == tag);
                    extra.map(|extra| extra.value.clone())
                };
                assert_eq!(value(ECHO_TIME).as_deref(), Some(b"2.5 ".as_slice()));
                assert_eq!(value(0x0008_0060).as_deref(), Some(b"CT".as_slice()));
                assert_eq!(value(INDEX).map(|bytes| bytes.len()), Some(4));
                assert_eq!(frame.position_index, Some(3), "{syntax} {defined}");
            }
        }
    }

    #[test]
    fn garbage_in_a_private_sequence_is_no_error() {
        for private in [b"\xfe\xff\x00\xe0\xff\xff\xff\x7f".as_slice(), &[7; 30]] {
            let bytes = enhanced(EXPLICIT, true, private);
            let source = Source::Bytes(&bytes);
            let found = frames_of(source, &[ECHO_TIME]);
            assert_eq!(found.first().map(|frame| frame.extra.len()), Some(1));
        }
    }
}
