//! Tests of the parsers and printers of sizes, addresses, ranges and times.

use proptest::prelude::*;

use super::*;

#[test]
fn sizes_in_every_unit() {
    let cases = [
        ("0", 0),
        ("4096", 4096),
        ("4096b", 4096),
        ("1K", KIB),
        ("1KiB", KIB),
        ("512m", 512 * MIB),
        (" 2 GiB ", 2 * GIB),
        ("1T", TIB),
        ("0x1000", 4096),
        ("1_024", 1024),
    ];
    for (text, bytes) in cases {
        assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
    }
}

#[test]
fn texts_that_are_no_sizes() {
    for text in ["", "G", "1Q", "-1", "1.5G", "1G1", "0x", "1 2", "١G"] {
        assert!(text.parse::<Size>().is_err(), "{text}");
    }
    let error = "99999999999T".parse::<Size>().unwrap_err();
    assert_eq!(error.to_string(), "\"99999999999T\" does not fit in 64 bits: write a smaller number");
}

#[test]
fn ranges() {
    assert_eq!("0x200040+64".parse(), Ok(ByteRange::new(0x200040, 64)));
    assert_eq!("4096+1M".parse(), Ok(ByteRange::new(4096, MIB)));
    assert_eq!("7".parse(), Ok(ByteRange::new(7, 1)));
    assert_eq!(
        "7+0".parse::<ByteRange>().unwrap_err().to_string(),
        "\"7+0\" is an empty range: write a length of at least 1, such as 0x200040+64"
    );
    assert!("0xffffffffffffffff+2".parse::<ByteRange>().is_err());
    assert!(ByteRange::new(0, 10).overlaps(&ByteRange::new(9, 1)));
    assert!(!ByteRange::new(0, 10).overlaps(&ByteRange::new(10, 1)));
    assert!(ByteRange::new(u64::MAX, u64::MAX).overlaps(&ByteRange::new(u64::MAX, 1)));
}

#[test]
fn times() {
    assert_eq!("90".parse(), Ok(TimeSpan(Duration::from_secs(90))));
    assert_eq!("500ms".parse(), Ok(TimeSpan(Duration::from_millis(500))));
    assert_eq!("5m".parse(), Ok(TimeSpan(Duration::from_secs(300))));
    assert!("5 years".parse::<TimeSpan>().is_err());
    assert!("99999999999999999h".parse::<TimeSpan>().is_err());
}

#[test]
fn json_forms() {
    assert_eq!(serde_json::to_string(&Address(0xffff_ffff_8100_0000)).unwrap(), "\"0xffffffff81000000\"");
    assert_eq!(serde_json::from_str::<Address>("4096").unwrap(), Address(4096));
    assert_eq!(serde_json::from_str::<Size>("\"1G\"").unwrap(), Size(GIB));
    let error = serde_json::from_str::<Size>("-1").unwrap_err().to_string();
    assert!(error.contains("a size such as \"512M\" or a number of at least 0"), "{error}");
}

proptest! {
    #[test]
    fn parsers_take_any_text(text in "\\PC{0,40}") {
        let _ = text.parse::<Size>();
        let _ = text.parse::<Address>();
        let _ = text.parse::<ByteRange>();
        let _ = text.parse::<TimeSpan>();
    }

    #[test]
    fn what_is_printed_is_read_back(bytes: u64, offset in 0u64..1 << 63, length in 1u64..1 << 62, ms in 0u64..1 << 40) {
        prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        prop_assert_eq!(Address(bytes).to_string().parse(), Ok(Address(bytes)));
        let range = ByteRange::new(offset, length);
        prop_assert_eq!(range.to_string().parse(), Ok(range));
        let span = TimeSpan(Duration::from_millis(ms));
        prop_assert_eq!(span.to_string().parse(), Ok(span));
    }
}
