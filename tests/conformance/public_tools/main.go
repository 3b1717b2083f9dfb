// Reads a log of AetherOS with golang.org/x/mod/sumdb alone, the code behind Go's checksum database: its signed notes
// (sumdb/note), its tree, proofs and tiles (sumdb/tlog). Usage: check DIR VKEY; any failure exits 1.
package main

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Tiles are those of height 8; their paths differ from Go's by the height that stands in front.
type files struct{ dir string }

func (f files) Height() int                             { return 8 }
func (f files) SaveTiles(_ []tlog.Tile, _ [][]byte)     {}
func (f files) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var found [][]byte
	for _, tile := range tiles {
		path := strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
		data, err := os.ReadFile(filepath.Join(f.dir, path))
		if err != nil {
			return nil, err
		}
		found = append(found, data)
	}
	return found, nil
}

func entries(dir string, size int64) (found [][]byte) {
	for n := int64(0); n*256 < size; n++ {
		width := int(min(256, size-n*256))
		path := strings.Replace(tlog.Tile{H: 8, L: -1, N: n, W: width}.Path(), "tile/8/data/", "tile/entries/", 1)
		data, err := os.ReadFile(filepath.Join(dir, path))
		fail(err)
		for len(data) > 0 {
			end := 2 + int(data[0])<<8 + int(data[1])
			found, data = append(found, data[2:end]), data[end:]
		}
	}
	return found
}

func fail(err error) {
	if err != nil {
		fmt.Println("not verified:", err)
		os.Exit(1)
	}
}

func main() {
	dir := os.Args[1]
	verifier, err := note.NewVerifier(os.Args[2])
	fail(err)
	text, err := os.ReadFile(filepath.Join(dir, "checkpoint"))
	fail(err)
	signed, err := note.Open(text, note.VerifierList(verifier))
	fail(err)
	lines := strings.Split(signed.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() {
		fail(fmt.Errorf("not a checkpoint of %s", verifier.Name()))
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	fail(err)
	raw, err := base64.StdEncoding.DecodeString(lines[2])
	fail(err)
	tree := tlog.Tree{N: size}
	copy(tree.Hash[:], raw)
	reader := tlog.TileHashReader(tree, files{dir})
	root, err := tlog.TreeHash(size, reader)
	fail(err)
	if !bytes.Equal(root[:], raw) {
		fail(fmt.Errorf("another root"))
	}
	records := entries(dir, size)
	if int64(len(records)) != size {
		fail(fmt.Errorf("%d entries of %d", len(records), size))
	}
	for index, record := range records {
		proof, err := tlog.ProveRecord(size, int64(index), reader)
		fail(err)
		fail(tlog.CheckRecord(proof, size, tree.Hash, int64(index), tlog.RecordHash(record)))
	}
	for old := int64(1); old <= size; old++ {
		proof, err := tlog.ProveTree(size, old, reader)
		fail(err)
		hash, err := tlog.TreeHash(old, reader)
		fail(err)
		fail(tlog.CheckTree(proof, size, tree.Hash, old, hash))
	}
	fmt.Printf("verified: %d entries of %s\n", size, lines[0])
}
