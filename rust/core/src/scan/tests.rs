use std::io::Write as _;
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::{DeflateEncoder, ZlibEncoder};

use super::*;
use crate::image::scan_image;
use crate::testing::{
    BIG, DEFLATED, EXPLICIT, IMPLICIT, Noise, TemporaryFile, UNDEFINED, Writer, image,
};

/// Tag, VR and value.
type Element = (u32, String, Option<Vec<u8>>);

/// The tags and values of an object, the same from bytes and from a file.
fn read(bytes: &[u8], syntax: Option<&str>) -> Result<Vec<Element>> {
    let file = TemporaryFile::new(bytes);
    let from_file = values(scan(Source::File(file.path()), syntax), None);
    let from_bytes = values(scan(Source::Bytes(bytes), syntax), Some(bytes));
    match (&from_file, &from_bytes) {
        (Ok(file), Ok(bytes)) => assert_eq!(file, bytes),
        (Err(file), Err(bytes)) => assert_eq!(file.to_string(), bytes.to_string()),
        _ => panic!("file {from_file:?}, bytes {from_bytes:?}"),
    }
    from_bytes
}

fn values(header: Result<Header>, whole: Option<&[u8]>) -> Result<Vec<Element>> {
    let header = header?;
    let mut found = Vec::new();
    for entry in header.layout().entries() {
        let value = header
            .value(entry.tag, whole)?
            .map(|(_, value)| value.into_owned());
        found.push((entry.tag, entry.vr().to_owned(), value));
    }
    Ok(found)
}

fn tags(bytes: &[u8]) -> Vec<u32> {
    let found = read(bytes, None).unwrap();
    found
        .iter()
        .map(|(tag, _, _)| *tag)
        .filter(|tag| tag >> 16 != 2)
        .collect()
}

fn message(bytes: &[u8]) -> String {
    message_of(bytes, None)
}

fn message_of(bytes: &[u8], syntax: Option<&str>) -> String {
    match read(bytes, syntax) {
        Err(error @ Error::InvalidDicom(_)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn nested(syntax: &str, vr: &str, depth: usize, defined: bool) -> Writer {
    let mut inner = Writer::new(syntax).text(0x0008_0100, "SH", "code");
    for _ in 0..depth {
        inner = Writer::new(syntax).sequence(0x0040_A730, vr, &inner, defined);
    }
    inner
}

fn deflate(writer: &Writer) -> Writer {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(&writer.bytes).unwrap();
    Writer {
        bytes: encoder.finish().unwrap(),
        ..Writer::default()
    }
}

#[test]
fn every_syntax_gives_the_same_elements() {
    let expected: Vec<_> = read(&image(EXPLICIT).part10(EXPLICIT), None).unwrap();
    assert_eq!(expected.len(), 3 + 17);
    assert_eq!(
        expected[4],
        (0x0008_0018, "UI".into(), Some(b"1.2.3.4.5 ".to_vec()))
    );
    assert_eq!(expected.last(), Some(&(0x7FE0_0010, "OW".into(), None)));
    let deflated = deflate(&image(EXPLICIT));
    let objects = [
        (IMPLICIT, image(IMPLICIT)),
        (BIG, image(BIG)),
        (DEFLATED, deflated.clone()),
    ];
    for (syntax, writer) in &objects {
        let bytes = writer.part10(syntax);
        let header = scan(Source::Bytes(&bytes), None).unwrap();
        assert_eq!(header.layout().transfer_syntax(), *syntax);
        assert_eq!(header.layout().big_endian(), *syntax == BIG);
        assert!(header.layout().is_native());
        assert_eq!(header.layout().pixels().unwrap().length, 12);
        let found = read(&bytes, None).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected).skip(3) {
            assert_eq!(found.0, expected.0);
            assert_eq!(
                found.1,
                if *syntax == IMPLICIT {
                    ""
                } else {
                    expected.1.as_str()
                }
            );
            if expected.1 != "US" {
                assert_eq!(found.2, expected.2);
            }
        }
        let bare = read(&writer.bytes, Some(syntax)).unwrap();
        assert_eq!(bare, found[3..]);
    }
}

#[test]
fn deflated_with_a_zlib_header_is_read_and_a_cut_one_is_refused() {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(&image(EXPLICIT).bytes).unwrap();
    let zlib = Writer {
        bytes: encoder.finish().unwrap(),
        ..Writer::default()
    };
    assert_eq!(tags(&zlib.part10(DEFLATED)).len(), 17);
    let raw = deflate(&image(EXPLICIT)).part10(DEFLATED);
    assert!(message(&raw[..raw.len() - 9]).contains("deflated dataset"));
    assert_eq!(tags(&[&raw[..], b"\0"].concat()).len(), 17);
}

#[test]
fn deflate_bomb_is_refused_without_harm() {
    let bomb = Writer {
        bytes: vec![0; 32 << 20],
        ..Writer::default()
    };
    assert!(message(&deflate(&bomb).part10(DEFLATED)).contains("(0000,0000)"));
}

#[test]
fn meta_information_may_be_odd_or_missing() {
    let expected = tags(&image(EXPLICIT).part10(EXPLICIT));
    let whole = image(EXPLICIT).part10(EXPLICIT);
    // Without preamble, without prefix, without any meta information.
    assert_eq!(tags(&whole[128..]), expected);
    assert_eq!(tags(&whole[132..]), expected);
    for syntax in [EXPLICIT, BIG, IMPLICIT] {
        let bytes = image(syntax).bytes;
        assert_eq!(tags(&bytes), expected, "{syntax}");
        let header = scan(Source::Bytes(&bytes), None).unwrap();
        assert_eq!(header.layout().transfer_syntax(), syntax);
    }
    // A wrong group length.
    let mut wrong = whole.clone();
    wrong[140..144].copy_from_slice(&7_u32.to_le_bytes());
    assert_eq!(tags(&wrong), expected);
    // Implicit VR, which is against the standard.
    let meta = Writer::new(IMPLICIT).text(0x0002_0010, "", BIG);
    let mut odd = [&[0; 128][..], b"DICM", &meta.bytes].concat();
    odd.extend(image(BIG).bytes);
    assert_eq!(tags(&odd), expected);
}

#[test]
fn explicit_dataset_that_claims_to_be_implicit_is_read() {
    assert_eq!(
        tags(&image(EXPLICIT).part10(IMPLICIT)),
        tags(&image(EXPLICIT).part10(EXPLICIT))
    );
}

#[test]
fn element_without_vr_in_an_explicit_dataset_is_read_as_implicit() {
    let mut writer = Writer::new(EXPLICIT).text(0x0008_0060, "CS", "CT");
    writer.header(0x0009_1001, "", 4);
    writer.bytes.extend(b"abcd");
    let bytes = writer.text(0x0010_0010, "PN", "x").part10(EXPLICIT);
    assert_eq!(tags(&bytes), [0x0008_0060, 0x0009_1001, 0x0010_0010]);
}

#[test]
fn sequences_are_passed_over_whatever_their_lengths() {
    for syntax in [EXPLICIT, IMPLICIT, BIG] {
        for defined in [true, false] {
            let inner = nested(syntax, "SQ", 3, !defined);
            let bytes = Writer::new(syntax)
                .text(0x0008_0060, "CS", "CT")
                .sequence(0x0008_1140, "SQ", &inner, defined)
                .text(0x0010_0010, "PN", "x")
                .part10(syntax);
            assert_eq!(tags(&bytes), [0x0008_0060, 0x0008_1140, 0x0010_0010]);
        }
    }
}

#[test]
fn unknown_vr_of_undefined_length_holds_implicit_little_endian() {
    let inner = nested(IMPLICIT, "", 2, false);
    let bytes = Writer::new(EXPLICIT);
    let mut bytes = bytes.lie(0x0009_1001, "UN", UNDEFINED, &[]);
    bytes.header(0xFFFE_E000, "", inner.bytes.len() as u32);
    bytes.bytes.extend(&inner.bytes);
    let bytes = bytes
        .end_of_sequence()
        .text(0x0010_0010, "PN", "x")
        .part10(EXPLICIT);
    assert_eq!(tags(&bytes), [0x0009_1001, 0x0010_0010]);
}

#[test]
fn only_the_top_level_has_the_pixel_data() {
    let icon = image(EXPLICIT);
    let compressed = Writer::new(EXPLICIT)
        .fragments(&[b"", b"abcd"])
        .end_of_sequence();
    for (inner, defined) in [
        (&icon, true),
        (&icon, false),
        (&compressed, true),
        (&compressed, false),
    ] {
        let bytes = Writer::new(EXPLICIT)
            .sequence(0x0088_0200, "SQ", inner, defined)
            .put(0x7FE0_0010, "OW", b"12")
            .put(0xFFFC_FFFC, "OB", b"padding")
            .part10(EXPLICIT);
        assert_eq!(tags(&bytes), [0x0088_0200, 0x7FE0_0010]);
        let header = scan(Source::Bytes(&bytes), None).unwrap();
        assert_eq!(header.layout().pixels().unwrap().length, 2);
    }
}

#[test]
fn sixty_four_levels_are_read_and_deeper_ones_refused_at_once() {
    let bomb = |syntax: &str, vr: &str, depth: usize, defined: bool| {
        nested(syntax, vr, depth, defined).part10(syntax)
    };
    let kinds = [
        (EXPLICIT, "SQ"),
        (EXPLICIT, "UN"),
        (IMPLICIT, ""),
        (BIG, "SQ"),
    ];
    for (syntax, vr) in kinds {
        for defined in [true, false] {
            if vr == "UN" {
                continue;
            }
            assert_eq!(tags(&bomb(syntax, vr, 64, defined)), [0x0040_A730]);
            for depth in [65, 1000] {
                let found = message(&bomb(syntax, vr, depth, defined));
                assert!(
                    found.contains("(0040,A730)") && found.contains("64 deep"),
                    "{found}"
                );
            }
        }
    }
    // Twenty thousand openings, and none that closes.
    let mut deep = Writer::new(EXPLICIT);
    for _ in 0..20_000 {
        deep.header(0x0040_A730, "SQ", UNDEFINED);
        deep.header(0xFFFE_E000, "", UNDEFINED);
    }
    assert!(message(&deep.part10(EXPLICIT)).contains("64 deep"));
    // Hidden in a private element of an implicit dataset.
    let hidden = nested(IMPLICIT, "", 70, true);
    let hidden = Writer::new(IMPLICIT).sequence(0x0009_1001, "", &hidden, true);
    assert!(message(&hidden.part10(IMPLICIT)).contains("64 deep"));
}

#[test]
fn lying_lengths_are_refused_and_named() {
    let lies = [
        Writer::new(EXPLICIT).lie(0x0010_0010, "PN", 100, b"x "),
        Writer::new(EXPLICIT).lie(0x0010_0010, "OB", 0xFFFF_FFF0, b"0123456789"),
        Writer::new(EXPLICIT).lie(0x0010_0010, "UT", UNDEFINED, b"0123456789"),
        Writer::new(EXPLICIT).lie(0x0010_0010, "SQ", UNDEFINED, b"0123456789"),
        Writer::new(EXPLICIT).lie(0x0010_0010, "SQ", 10, b"0123456789"),
    ];
    for lie in lies {
        let mut bytes = Writer::new(EXPLICIT).text(0x0008_0018, "UI", "1.2.3.4.5");
        bytes.bytes.extend(lie.bytes);
        let found = message(&bytes.part10(EXPLICIT));
        assert!(found.contains("1.2.3.4.5: (0010,0010)"), "{found}");
        let found = message_of(&bytes.bytes, Some(EXPLICIT));
        assert!(found.contains("1.2.3.4.5: (0010,0010)"), "{found}");
    }
    let lie = Writer::new(EXPLICIT).lie(0x0008_0100, "SH", 40, b"x ");
    for defined in [true, false] {
        let bytes = Writer::new(EXPLICIT).sequence(0x0040_A730, "SQ", &lie, defined);
        assert!(message(&bytes.part10(EXPLICIT)).contains("(0008,0100)"));
    }
}

#[test]
fn private_sequence_of_defined_length_may_be_malformed_inside() {
    let lie = Writer::new(EXPLICIT).lie(0x0009_1002, "SH", 400, b"x ");
    let bytes = Writer::new(EXPLICIT)
        .sequence(0x0009_1001, "SQ", &lie, true)
        .text(0x0010_0010, "PN", "x")
        .part10(EXPLICIT);
    assert_eq!(tags(&bytes), [0x0009_1001, 0x0010_0010]);
    // In Implicit VR, bytes that only look like a sequence.
    let bytes = Writer::new(IMPLICIT)
        .put(
            0x0009_1001,
            "",
            b"\xFE\xFF\x00\xE0\xFF\xFF\xFF\xFFany bytes at all",
        )
        .text(0x0010_0010, "PN", "x")
        .part10(IMPLICIT);
    assert_eq!(tags(&bytes), [0x0009_1001, 0x0010_0010]);
}

#[test]
fn every_cut_of_an_object_is_an_error_except_between_elements() {
    let whole = image(EXPLICIT).part10(EXPLICIT);
    let header = scan(Source::Bytes(&whole), None).unwrap();
    let starts: Vec<u64> = header
        .layout()
        .entries()
        .iter()
        .map(|entry| entry.offset - if entry.vr() == "OW" { 12 } else { 8 })
        .collect();
    for cut in 1..whole.len() {
        let found = scan(Source::Bytes(&whole[..cut]), None);
        assert_eq!(
            found.is_ok(),
            starts.contains(&(cut as u64)) && cut > 132,
            "cut at {cut}"
        );
    }
}

#[test]
fn encapsulated_pixel_data_must_end_within_the_object() {
    let base = Writer::new(EXPLICIT).text(0x0008_0018, "UI", "1.2.3.4.5");
    let open = base.clone().fragments(&[b"", b"abcdef"]);
    let closed = open.clone().end_of_sequence();
    let jpeg = "1.2.840.10008.1.2.4.70";
    for good in [&open, &closed] {
        let bytes = good.part10(jpeg);
        assert_eq!(tags(&bytes), [0x0008_0018, 0x7FE0_0010]);
        let header = scan(Source::Bytes(&bytes), None).unwrap();
        assert!(!header.layout().is_native());
    }
    let whole = closed.part10(jpeg);
    for missing in [1, 7, 9, 13, 15] {
        let found = message(&whole[..whole.len() - missing]);
        assert!(found.contains("1.2.3.4.5: (7FE0,0010)"), "{found}");
    }
    let mut garbage = open.part10(jpeg);
    garbage.extend(b"any bytes at all");
    assert!(message(&garbage).contains("expected a fragment"));
}

#[test]
fn compressed_syntax_with_a_defined_length_is_not_native() {
    let bytes = image(EXPLICIT).part10("1.2.840.10008.1.2.4.70");
    let header = scan(Source::Bytes(&bytes), None).unwrap();
    assert!(!header.layout().is_native());
}

#[test]
fn foreign_groups_and_junk_are_refused() {
    let base = image(EXPLICIT);
    let bare = Writer::new(EXPLICIT).text(0x0008_0018, "UI", "1.2.3.4.5");
    assert!(
        message(&bare.clone().put(0x0000_0002, "UI", b"").part10(EXPLICIT)).contains("(0000,0002)")
    );
    assert!(
        message(&bare.clone().put(0xFFFE_E000, "", b"").part10(EXPLICIT)).contains("(FFFE,E000)")
    );
    for junk in [
        &b""[..],
        b"\0",
        b"DICM",
        &[0; 131],
        &[0; 200],
        b"hello world, no image here",
        &[0xFF; 300],
    ] {
        assert!(message(junk).contains("expected"), "{junk:?}");
        assert!(
            message_of(junk, Some(IMPLICIT)).contains("expected"),
            "{junk:?}"
        );
        assert!(!is_dicom(TemporaryFile::new(junk).path()).unwrap() || junk == b"DICM");
    }
    assert!(is_dicom(TemporaryFile::new(&base.bytes).path()).unwrap());
    assert!(is_dicom(TemporaryFile::new(&base.part10(EXPLICIT)).path()).unwrap());
}

#[test]
fn short_zero_padding_is_tolerated() {
    let base = Writer::new(EXPLICIT)
        .text(0x0008_0060, "CS", "CT")
        .part10(EXPLICIT);
    assert_eq!(tags(&[&base[..], &[0; 7]].concat()), [0x0008_0060]);
    assert!(message(&[&base[..], &[0; 8]].concat()).contains("(0000,0000)"));
    assert!(message(&[&base[..], b"abc"].concat()).contains("found 3 bytes"));
}

#[test]
fn long_values_of_a_file_are_skipped_and_read_when_asked_for() {
    let long: Vec<u8> = (0..700_000_u32).map(|i| i as u8).collect();
    let mut writer = Writer::new(EXPLICIT);
    for group in 0..3 {
        writer = writer.put(0x0009_1000 + (group << 17), "OB", &long).text(
            0x000A_0010 + (group << 17),
            "LO",
            "between",
        );
    }
    let bytes = writer.put(0x7FE0_0010, "OW", &long).part10(EXPLICIT);
    assert_eq!(read(&bytes, None).unwrap().len(), 3 + 7);
    let file = TemporaryFile::new(&bytes);
    let header = scan(Source::File(file.path()), None).unwrap();
    let Held::Windows { parts, .. } = &header.held else {
        panic!()
    };
    let kept: usize = parts.iter().map(|part| part.bytes.len()).sum();
    assert!(kept < 128 << 10, "{kept}");
    drop(file);
    assert!(matches!(
        header.value(0x0009_1000, None),
        Err(Error::Io { .. })
    ));
}

#[test]
fn repeated_and_unordered_elements_are_found() {
    let bytes = Writer::new(EXPLICIT)
        .text(0x0010_0020, "LO", "first")
        .text(0x0008_0060, "CS", "CT")
        .text(0x0010_0020, "LO", "last")
        .part10(EXPLICIT);
    let header = scan(Source::Bytes(&bytes), None).unwrap();
    assert_eq!(header.layout().tags(), [0x0010_0020, 0x0008_0060]);
    let (_, value) = header.value(0x0010_0020, Some(&bytes)).unwrap().unwrap();
    assert_eq!(value, b"last".as_slice());
    assert!(header.layout().find(0x0010_0010).is_none());
    assert!(header.layout().find(0xFFFF_FFFF).is_none());
    assert!(header.layout().find(0).is_none());
}

#[test]
fn behind_the_pixel_data_is_nothing_that_a_header_tells() {
    let image = || {
        Writer::new(EXPLICIT)
            .text(0x0010_0020, "LO", "P1")
            .put(0x7FE0_0010, "OW", b"12")
    };
    let harmless = image().put(0xFFFC_FFFC, "OB", &[0; 6]);
    assert_eq!(tags(&harmless.part10(EXPLICIT)), [0x0010_0020, 0x7FE0_0010]);
    let mut padded = image().part10(EXPLICIT);
    padded.extend([0; 100]);
    assert_eq!(tags(&padded), [0x0010_0020, 0x7FE0_0010]);
    for tag in [0x0010_0020, 0x0028_1053, 0x7FE0_0010] {
        let bytes = image().put(tag, "UN", b"P2").part10(EXPLICIT);
        assert!(message(&bytes).contains("after the pixel data"));
    }
    let cut = image().lie(0xFFFC_FFFC, "OB", 99, b"").part10(EXPLICIT);
    assert!(!message(&cut).is_empty());
}

#[test]
fn hostile_megabytes_end_within_a_tenth_of_a_second() {
    let mut many = Writer::new(EXPLICIT);
    while many.bytes.len() < 1_000_000 {
        many.header(0x0009_0001, "LO", 0);
    }
    let mut items = Writer::new(EXPLICIT);
    items.header(0x0040_A730, "SQ", UNDEFINED);
    while items.bytes.len() < 1_000_000 {
        items.header(0xFFFE_E000, "", 0);
    }
    let mut tentative = Writer::new(IMPLICIT);
    let inner = nested(IMPLICIT, "", 63, true).lie(0x0009_0001, "", 99, b"");
    while tentative.bytes.len() < 1_000_000 {
        tentative = tentative.sequence(0x0009_0001, "", &inner, true);
    }
    let mut fragments = Writer::new(EXPLICIT);
    fragments.header(0x7FE0_0010, "OB", UNDEFINED);
    while fragments.bytes.len() < 1_000_000 {
        fragments.header(0xFFFE_E000, "", 0);
    }
    for (writer, syntax) in [
        (many, EXPLICIT),
        (items, EXPLICIT),
        (tentative, IMPLICIT),
        (fragments, EXPLICIT),
    ] {
        let bytes = writer.part10(syntax);
        let start = Instant::now();
        // Good or bad does not matter here.
        let _ = scan(Source::Bytes(&bytes), None);
        assert!(
            start.elapsed() < Duration::from_millis(100),
            "{:?}",
            start.elapsed()
        );
    }
}

#[test]
fn too_many_elements_are_refused() {
    let mut many = Writer::new(EXPLICIT);
    for _ in 0..=MAX_ELEMENTS {
        many.header(0x0009_0001, "LO", 0);
    }
    assert!(message(&many.bytes.clone()).contains("expected a DICOM object"));
    assert!(message(&many.part10(EXPLICIT)).contains("top-level elements"));
}

#[test]
fn twenty_thousand_mutations_neither_panic_nor_disagree() {
    let mut bases = Vec::new();
    for syntax in [EXPLICIT, IMPLICIT, BIG] {
        let mut icon = image(syntax);
        icon = icon.sequence(0x0088_0200, "SQ", &image(syntax), false);
        let mut writer = Writer::new(syntax)
            .sequence(0x0008_1140, "SQ", &nested(syntax, "SQ", 2, true), false)
            .sequence(0x0008_1150, "UN", &nested(IMPLICIT, "", 2, true), true)
            .sequence(0x0009_1001, "SQ", &icon, true);
        writer.bytes.extend(image(syntax).bytes);
        bases.push(writer.part10(syntax));
    }
    let encapsulated = Writer::new(EXPLICIT)
        .fragments(&[b"", b"abc"])
        .end_of_sequence();
    bases.push(encapsulated.part10("1.2.840.10008.1.2.4.50"));
    bases.push(deflate(&image(EXPLICIT)).part10(DEFLATED));
    let mut noise = Noise::new();
    let nasty = [
        0x00, 0xFF, 0xFE, 0x7F, 0x80, 0xE0, 0x0D, 0xDD, b'S', b'Q', b'U', b'N',
    ];
    let mut good = 0;
    for round in 0..20_000 {
        let mut bytes = bases[noise.below(bases.len())].clone();
        // Past the preamble, which is 128 bytes of nothing.
        for _ in 0..=noise.below(6) {
            let at = 128 + noise.below(bytes.len() - 128);
            match noise.below(6) {
                0 => bytes[at] = noise.next() as u8,
                1 => bytes[at] = nasty[noise.below(nasty.len())],
                2 => bytes[at] ^= 1 << noise.below(8),
                3 => bytes.truncate(at.max(129)),
                4 => {
                    let end = (at + noise.below(40)).min(bytes.len());
                    let copy = bytes[at..end].to_vec();
                    let to = 128 + noise.below(bytes.len() - 128);
                    bytes.splice(to..to, copy);
                }
                _ => {
                    let end = (at + 4).min(bytes.len());
                    bytes[at..end].fill(0xFF);
                }
            }
        }
        let syntax = match round % 4 {
            0 => Some([EXPLICIT, IMPLICIT, BIG, DEFLATED][noise.below(4)]),
            _ => None,
        };
        let bytes = if syntax.is_some() {
            &bytes[128..]
        } else {
            &bytes[..]
        };
        let found = values(scan(Source::Bytes(bytes), syntax), Some(bytes));
        good += usize::from(found.is_ok());
        // Only the absence of a panic matters here; what it returns is tested elsewhere.
        let _ = scan_image(Source::Bytes(bytes), &mut Vec::new());
        if round % 20 == 0 {
            // Compared inside.
            let _ = read(bytes, syntax);
        }
    }
    assert!((1000..19_000).contains(&good), "{good} of 20000 are good");
}
