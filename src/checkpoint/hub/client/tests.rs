//! What a client says and does not say.

use super::*;

#[test]
fn redirects_resolve() {
    let base = "https://hub:8080/org/name/resolve/main/a.bin";
    for (location, expected) in [
        ("/b?x=https://c", Some("https://hub:8080/b?x=https://c")),
        ("https://cdn/b?sig=1", Some("https://cdn/b?sig=1")),
        ("//cdn/b", Some("https://cdn/b")),
        ("b.bin", Some("https://hub:8080/org/name/resolve/main/b.bin")),
        ("http://", None),
        ("ftp://cdn/b", None),
    ] {
        assert_eq!(resolve(base, location).as_deref(), expected, "{location}");
    }
}

#[test]
fn the_token_is_for_the_hub() {
    let repo = RepoId::parse("o/n").unwrap();
    let settings = HubSettings::from_lookup(|name| match name {
        "HOME" => Some("/u".to_string()),
        "HF_ENDPOINT" => Some("http://mirror:8000/hf".to_string()),
        _ => None,
    })
    .unwrap();
    let client = Client::new(&repo, &settings);
    for (url, expected) in [
        ("http://mirror:8000/x", true),
        ("http://MIRROR:8000/x", true),
        ("https://huggingface.co/x", true),
        ("https://huggingface.co:443/x", true),
        ("http://mirror/x", false),
        ("http://mirror:8001/x", false),
        ("https://mirror:8000/x", false),
        ("http://huggingface.co/x", false),
        ("https://huggingface.co.evil.org/x", false),
        ("https://huggingface.co@evil.org/x", false),
        ("not an address", false),
    ] {
        assert_eq!(client.may_see_token(url), expected, "{url}");
    }
}

#[test]
fn headers_are_read() {
    assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
    assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
    for bad in ["", "bytes */10", "bytes 5/10", "items 5-9/10", "bytes 5-9/x"] {
        assert_eq!(content_range(bad), None, "{bad}");
    }
    assert_eq!(file_name_of_etag("\"abc-1\"").as_deref(), Some("abc-1"));
    assert_eq!(file_name_of_etag("W/\"abc\"").as_deref(), Some("abc"));
    for bad in ["", "\"\"", "\"../x\"", "\"a/b\"", "\"a b\"", "\".x\""] {
        assert_eq!(file_name_of_etag(bad), None, "{bad}");
    }
    assert_eq!(quoted("a/b c#1?%.bin"), "a/b%20c%231%3F%25.bin");
}
