package agent

import "testing"

func mustParse(t *testing.T, text string) Version {
	t.Helper()
	v, err := ParseVersion(text)
	if err != nil {
		t.Fatalf("ParseVersion(%q): %v", text, err)
	}
	return v
}

func TestCompareOrdersVersions(t *testing.T) {
	// Each is lower than the next.
	ordered := []string{
		"0.9.9", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta.2",
		"1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.1", "1.10.0", "2.0.0",
	}
	for i := range ordered {
		for j := range ordered {
			got := mustParse(t, ordered[i]).Compare(mustParse(t, ordered[j]))
			if want := compareInts(i, j); got != want {
				t.Errorf("%s against %s: got %d, want %d", ordered[i], ordered[j], got, want)
			}
		}
	}
}

func TestParseVersionIgnoresBuildMetadata(t *testing.T) {
	a, b := mustParse(t, "v1.2.3+linux"), mustParse(t, "1.2.3+darwin")
	if a.Compare(b) != 0 {
		t.Errorf("%v and %v differ", a, b)
	}
}

func TestParseVersionRejects(t *testing.T) {
	for _, text := range []string{"", "1", "1.2", "1.2.3.4", "1.x.3", "1.-2.3"} {
		if v, err := ParseVersion(text); err == nil {
			t.Errorf("ParseVersion(%q) = %v, want an error", text, v)
		}
	}
}

func TestNewestLeavesOutPreReleases(t *testing.T) {
	versions := []Version{
		mustParse(t, "1.9.0"), mustParse(t, "2.0.0-rc.1"), mustParse(t, "1.10.0"),
	}
	got, ok := Newest(versions)
	if !ok {
		t.Fatal("no version found")
	}
	if want := mustParse(t, "1.10.0"); got.Compare(want) != 0 {
		t.Errorf("got %v, want %v", got, want)
	}
	if versions[0].Minor != 9 {
		t.Error("Newest has changed its argument")
	}
}

func TestNewestWithoutReleases(t *testing.T) {
	if v, ok := Newest([]Version{mustParse(t, "1.0.0-rc.1")}); ok {
		t.Errorf("got %v, want none", v)
	}
}
