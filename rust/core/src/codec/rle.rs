//! RLE Lossless (PS3.5 annex G): one segment for each byte of a sample, most significant first.

use super::{Decoded, Shape, broken};
use crate::error::Result;

const HEADER: usize = 64;

pub(super) fn decode(frame: &[u8], shape: Shape, into: &mut Decoded) -> Result<()> {
    let cell = shape.cell()?;
    let pixels = shape.rows as usize * shape.columns as usize;
    let wanted = cell * shape.samples as usize;
    let header = frame
        .get(..HEADER)
        .ok_or_else(|| broken("expected an RLE header of 64 bytes, found less"))?;
    let word = |at: usize| {
        let bytes = header.get(4 * at..4 * at + 4).unwrap_or_default();
        <[u8; 4]>::try_from(bytes).map_or(0, u32::from_le_bytes) as usize
    };
    if word(0) != wanted || wanted > 15 {
        return Err(broken(format!(
            "expected {wanted} RLE segments (SamplesPerPixel x BitsAllocated / 8, at most 15), found \
             {}",
            word(0)
        )));
    }
    // Two bytes stand for at most 128.
    shape.check_held(frame, 64)?;
    let mut scratch = std::mem::take(&mut into.scratch);
    let cells = into.prepare_cells(shape)?;
    let outcome = (0..wanted).try_for_each(|segment| {
        let start = word(segment + 1);
        let end = if segment + 1 < wanted {
            word(segment + 2)
        } else {
            frame.len()
        };
        let bytes = frame.get(start..end).filter(|_| start >= HEADER);
        let bytes =
            bytes.ok_or_else(|| broken(format!("RLE segment {segment} is not in the frame")))?;
        if wanted == 1 {
            return unpack(bytes, cells);
        }
        let plane = scratch.resize(pixels, 1)?;
        unpack(bytes, plane)?;
        let (sample, byte) = (segment / cell, segment % cell);
        let at = sample * cell + (cell - 1 - byte);
        spread(plane, cells, at, wanted);
        Ok(())
    });
    into.scratch = scratch;
    outcome
}

/// Put `plane` at `at` of every `step` bytes.
fn spread(plane: &[u8], cells: &mut [u8], at: usize, step: usize) {
    // A constant step is what the compiler can vectorise.
    match step {
        2 => spread_by::<2>(plane, cells, at),
        3 => spread_by::<3>(plane, cells, at),
        4 => spread_by::<4>(plane, cells, at),
        _ => {
            for (cell, byte) in cells.chunks_exact_mut(step).zip(plane) {
                if let Some(place) = cell.get_mut(at) {
                    *place = *byte;
                }
            }
        }
    }
}

fn spread_by<const STEP: usize>(plane: &[u8], cells: &mut [u8], at: usize) {
    let (cells, _) = cells.as_chunks_mut::<STEP>();
    if at < STEP {
        for (cell, byte) in cells.iter_mut().zip(plane) {
            cell[at] = *byte;
        }
    }
}

/// PackBits (PS3.5 section G.3.2): the whole of `out`, or the error.
fn unpack(mut bytes: &[u8], out: &mut [u8]) -> Result<()> {
    let size = out.len();
    let mut at = 0;
    while at < size {
        let [head, rest @ ..] = bytes else {
            return Err(broken(format!(
                "expected an RLE segment of {size} bytes, found {at}"
            )));
        };
        bytes = rest;
        if *head < 128 {
            let count = usize::from(*head) + 1;
            // What is too much is cut off: writers pad the last run.
            let room = count.min(size - at);
            let (Some(run), Some(place)) = (bytes.get(..room), out.get_mut(at..at + room)) else {
                return Err(broken(format!(
                    "expected an RLE segment of {size} bytes, found {at}"
                )));
            };
            place.copy_from_slice(run);
            bytes = bytes.get(count..).unwrap_or_default();
            at += room;
        } else if *head > 128 {
            let [value, rest @ ..] = bytes else {
                return Err(broken(format!(
                    "expected an RLE segment of {size} bytes, found {at}"
                )));
            };
            bytes = rest;
            let room = (257 - usize::from(*head)).min(size - at);
            if let Some(place) = out.get_mut(at..at + room) {
                place.fill(*value);
            }
            at += room;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(segments: &[&[u8]]) -> Vec<u8> {
        let mut header = vec![segments.len() as u32];
        let mut offset = 64;
        for segment in segments {
            header.push(offset);
            offset += segment.len() as u32;
        }
        header.resize(16, 0);
        let mut frame: Vec<u8> = header.iter().flat_map(|n| n.to_le_bytes()).collect();
        segments.iter().for_each(|segment| frame.extend(*segment));
        frame
    }

    fn shape(samples: u32, bits_allocated: u32) -> Shape {
        Shape {
            rows: 1,
            columns: 4,
            samples,
            bits_allocated,
        }
    }

    #[test]
    fn planes_become_little_endian_cells() {
        let mut decoded = Decoded::default();
        let bytes = frame(&[&[3, 0, 1, 2, 3], &[0xFE, 9, 0x80, 0, 7]]);
        decode(&bytes, shape(1, 16), &mut decoded).unwrap();
        assert_eq!(decoded.bytes(), [9, 0, 9, 1, 9, 2, 7, 3]);
        assert_eq!((decoded.allocated, decoded.precision), (16, None));
        let bytes = frame(&[&[0xFD, 1], &[0xFD, 2], &[0xFD, 3]]);
        decode(&bytes, shape(3, 8), &mut decoded).unwrap();
        assert_eq!(decoded.bytes(), [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3]);
        let bytes = frame(&[&[0xFD, 1], &[0xFD, 2], &[0xFD, 3], &[0xFD, 4]]);
        decode(&bytes, shape(1, 32), &mut decoded).unwrap();
        assert_eq!(decoded.bytes()[..4], [4, 3, 2, 1]);
    }

    #[test]
    fn what_is_not_all_there_is_an_error() {
        let mut decoded = Decoded::default();
        let good = frame(&[&[3, 0, 1, 2, 3], &[0xFD, 9]]);
        for length in 0..good.len() {
            assert!(
                decode(&good[..length], shape(1, 16), &mut decoded).is_err(),
                "{length}"
            );
        }
        assert!(decode(&good, shape(1, 8), &mut decoded).is_err());
        assert!(decode(&good, shape(3, 8), &mut decoded).is_err());
        for at in [4, 8] {
            for value in [0, 63, 0x7FFF_FFFF, u32::MAX] {
                let mut bad = good.clone();
                bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
                assert!(
                    decode(&bad, shape(1, 16), &mut decoded).is_err(),
                    "{at} {value}"
                );
            }
        }
    }
}
