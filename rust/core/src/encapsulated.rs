//! Encapsulated pixel data: which fragments make up which frame (PS3.5 annex A.4).
//!
//! The problem: compressed frames lie in fragments, and what says which belong together is often
//! absent or wrong. Only what the fragments themselves confirm is believed: an offset table counts
//! where every offset is the start of a fragment, and a frame is split off at a codestream's own
//! start marker only where that gives the number of frames that the header tells. Everything else is
//! an error, because a frame that is put together wrongly looks like an image.

use crate::codec::starts_codestream;
use crate::error::{Error, Result};
use crate::scan::{PIXEL_DATA, UNDEFINED};
use crate::source::Opened;

const ITEM: u32 = 0xFFFE_E000;
const SEQUENCE_DELIMITER: u32 = 0xFFFE_E0DD;
/// Most fragments of one object.
const MAX_FRAGMENTS: usize = 1 << 20;
/// Most bytes of a start marker that are looked at.
const MARKER: usize = 16;

/// Where one fragment's bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    pub offset: u64,
    pub length: u32,
}

/// The frames of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frames {
    fragments: Vec<Fragment>,
    /// Frame `k` is made of the fragments from `starts[k]` up to `starts[k + 1]`.
    starts: Vec<usize>,
}

impl Frames {
    /// Find `count` frames in the items that start at `offset`.
    ///
    /// `extended` are the values of the Extended Offset Table (7FE0,0001), little endian, empty
    /// without.
    ///
    /// Errors: [`Error::InvalidDicom`] for items that are not, or are cut off, and where the frames
    /// cannot be told apart.
    pub fn find(source: &Opened<'_>, offset: u64, count: u32, extended: &[u8]) -> Result<Self> {
        let (table, fragments) = items(source, offset)?;
        let count = count as usize;
        if fragments.is_empty() {
            return Err(trouble(format!("expected {count} frame(s), found none")));
        }
        let first = fragments.first().map_or(0, |one| one.offset - 8);
        let one_each = fragments.len() == count;
        if !one_each {
            let basic = read_table(source, table, count)?;
            let extended = offsets::<8>(extended);
            for offsets in [extended, basic] {
                if let Some(starts) = from_offsets(&fragments, first, &offsets, count) {
                    return Ok(Frames { fragments, starts });
                }
            }
        }
        let mut starts: Vec<usize> = (0..fragments.len()).collect();
        if !one_each {
            starts.clear();
            for (k, fragment) in fragments.iter().enumerate() {
                let mut bytes = [0; MARKER];
                let length = MARKER.min(fragment.length as usize);
                let bytes = bytes.get_mut(..length).unwrap_or_default();
                source.read(fragment.offset, bytes)?;
                if k == 0 || starts_codestream(bytes) {
                    starts.push(k);
                }
            }
        }
        if starts.len() != count {
            let (frames, found) = (starts.len(), fragments.len());
            return Err(trouble(format!(
                "expected {count} frame(s) (NumberOfFrames), found {found} fragment(s) that hold \
                 {frames}"
            )));
        }
        starts.push(fragments.len());
        Ok(Frames { fragments, starts })
    }

    /// The fragments of one frame; empty for a frame that is not there.
    pub fn frame(&self, frame: usize) -> &[Fragment] {
        let ends = self.starts.get(frame).zip(self.starts.get(frame + 1));
        ends.and_then(|(start, end)| self.fragments.get(*start..*end))
            .unwrap_or_default()
    }
}

fn trouble(message: String) -> Error {
    Error::invalid_at(PIXEL_DATA, message)
}

/// The Basic Offset Table, and the fragments after it.
fn items(source: &Opened<'_>, mut offset: u64) -> Result<(Fragment, Vec<Fragment>)> {
    let size = source.size();
    let mut table = None;
    let mut fragments = Vec::new();
    while offset != size {
        let mut header = [0; 8];
        if size.saturating_sub(offset) < 8 {
            return Err(trouble(format!(
                "expected a fragment at offset {offset}, found the end"
            )));
        }
        source.read(offset, &mut header)?;
        let [a, b, c, d, length @ ..] = header;
        let tag =
            u32::from(u16::from_le_bytes([a, b])) << 16 | u32::from(u16::from_le_bytes([c, d]));
        let length = u32::from_le_bytes(length);
        if tag == SEQUENCE_DELIMITER {
            break;
        }
        if tag != ITEM {
            return Err(trouble(format!(
                "expected a fragment at offset {offset}, found ({:04X},{:04X})",
                tag >> 16,
                tag & 0xFFFF
            )));
        }
        let left = size - offset - 8;
        if length == UNDEFINED || u64::from(length) > left {
            return Err(trouble(format!(
                "expected a fragment of {length} bytes at offset {offset}, found {left}"
            )));
        }
        if fragments.len() >= MAX_FRAGMENTS {
            return Err(trouble(format!(
                "expected at most {MAX_FRAGMENTS} fragments, found more"
            )));
        }
        let item = Fragment {
            offset: offset + 8,
            length,
        };
        offset += 8 + u64::from(length);
        if table.is_none() {
            table = Some(item);
        } else {
            fragments.push(item);
        }
    }
    let table = table.ok_or_else(|| trouble("expected fragments, found none".to_owned()))?;
    Ok((table, fragments))
}

/// The Basic Offset Table, empty where it is absent or not of `count` offsets.
fn read_table(source: &Opened<'_>, table: Fragment, count: usize) -> Result<Vec<u64>> {
    // The fragments lie behind the table, so it is within the object.
    if count.checked_mul(4) != Some(table.length as usize) {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; table.length as usize];
    source.read(table.offset, &mut bytes)?;
    Ok(offsets::<4>(&bytes))
}

fn offsets<const N: usize>(bytes: &[u8]) -> Vec<u64> {
    let number = |bytes: &[u8]| {
        let mut wide = [0; 8];
        wide.iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        u64::from_le_bytes(wide)
    };
    bytes.chunks_exact(N).map(number).collect()
}

/// The fragments at which frames start, where the offsets are those of fragments.
fn from_offsets(
    fragments: &[Fragment],
    first: u64,
    offsets: &[u64],
    count: usize,
) -> Option<Vec<usize>> {
    if count == 0 || offsets.len() != count {
        return None;
    }
    let mut starts = Vec::with_capacity(count + 1);
    for offset in offsets {
        let wanted = first.checked_add(*offset)?.checked_add(8)?;
        let found = fragments
            .binary_search_by_key(&wanted, |one| one.offset)
            .ok()?;
        if starts.last().is_some_and(|last| *last >= found) {
            return None;
        }
        starts.push(found);
    }
    (starts.first() == Some(&0)).then_some(())?;
    starts.push(fragments.len());
    Some(starts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;

    fn item(bytes: &[u8]) -> Vec<u8> {
        let mut item = b"\xFE\xFF\x00\xE0".to_vec();
        item.extend((bytes.len() as u32).to_le_bytes());
        item.extend(bytes);
        item
    }

    fn items_of(table: &[u32], fragments: &[&[u8]]) -> Vec<u8> {
        let table: Vec<u8> = table.iter().flat_map(|n| n.to_le_bytes()).collect();
        let mut bytes = item(&table);
        fragments.iter().for_each(|one| bytes.extend(item(one)));
        bytes.extend(b"\xFE\xFF\xDD\xE0\0\0\0\0");
        bytes
    }

    fn lengths(bytes: &[u8], count: u32, extended: &[u8]) -> Result<Vec<Vec<u32>>> {
        let source = Source::Bytes(bytes).open()?;
        let frames = Frames::find(&source, 0, count, extended)?;
        let of = |k| frames.frame(k).iter().map(|one| one.length).collect();
        Ok((0..count as usize).map(of).collect())
    }

    const START: &[u8] = b"\xFF\xD8\xFF\xE0";

    #[test]
    fn a_fragment_for_each_frame_needs_no_table_and_believes_none() {
        for table in [&[][..], &[0, 99], &[0, 12], &[7]] {
            let bytes = items_of(table, &[b"1234", b"567890"]);
            assert_eq!(lengths(&bytes, 2, &[]).unwrap(), [[4], [6]]);
        }
    }

    #[test]
    fn a_table_tells_which_fragments_form_a_frame() {
        let bytes = items_of(&[0, 24], &[b"1234", b"5678", b"90", b"12"]);
        assert_eq!(lengths(&bytes, 2, &[]).unwrap(), [[4, 4], [2, 2]]);
        let bytes = items_of(&[], &[b"1234", b"5678", b"90", b"12"]);
        let extended: Vec<u8> = [0_u64, 24].iter().flat_map(|n| n.to_le_bytes()).collect();
        assert_eq!(lengths(&bytes, 2, &extended).unwrap(), [[4, 4], [2, 2]]);
    }

    #[test]
    fn without_a_table_frames_start_at_a_start_marker() {
        for table in [&[][..], &[0, 13], &[12, 0], &[0, 0]] {
            let bytes = items_of(table, &[START, b"5678", START]);
            assert_eq!(lengths(&bytes, 2, &[]).unwrap(), [&[4, 4][..], &[4]]);
        }
    }

    #[test]
    fn one_frame_may_have_many_fragments_but_not_many_images() {
        let bytes = items_of(&[], &[START, b"56", b"78"]);
        assert_eq!(lengths(&bytes, 1, &[]).unwrap(), [[4, 2, 2]]);
        let bytes = items_of(&[], &[START, START]);
        assert!(lengths(&bytes, 1, &[]).is_err());
        assert!(lengths(&bytes, 3, &[]).is_err());
        assert!(lengths(&items_of(&[], &[]), 1, &[]).is_err());
    }

    #[test]
    fn a_missing_delimiter_is_tolerated_and_a_cut_fragment_is_not() {
        let whole = items_of(&[], &[b"1234"]);
        let end = whole.len();
        assert_eq!(lengths(&whole[..end - 8], 1, &[]).unwrap(), [[4]]);
        for length in (0..end).filter(|length| ![end - 8, 0, 8].contains(length)) {
            assert!(lengths(&whole[..length], 1, &[]).is_err(), "{length}");
        }
    }
}
