// Renders conversations with Go's own text/template, as Ollama calls it, for tests/export/go_templates.json:
//
//	go run tools/go_templates.go < tests/export/go_templates.json > new.json
//
// In: a list of {"template", "messages": [{"role", "content"}]}, whatever else stands there. Out: the same with "text",
// or "error".
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type Case struct {
	Template string    `json:"template"`
	Messages []Message `json:"messages"`
	Text     string    `json:"text,omitempty"`
	Error    string    `json:"error,omitempty"`
}

// Neighbours of one role are one message, and all system messages are .System, too.
func joined(messages []Message) (string, []*Message) {
	system, found := []string{}, []*Message{}
	for _, message := range messages {
		if message.Role == "system" {
			system = append(system, message.Content)
		}
		if last := len(found) - 1; last >= 0 && found[last].Role == message.Role && message.Role != "tool" {
			found[last].Content += "\n\n" + message.Content
			continue
		}
		copied := message
		found = append(found, &copied)
	}
	return strings.Join(system, "\n\n"), found
}

func render(each *Case) error {
	parsed, err := template.New("").Option("missingkey=zero").Parse(each.Template)
	if err != nil {
		return err
	}
	system, messages := joined(each.Messages)
	text := strings.Builder{}
	err = parsed.Execute(&text, map[string]any{"System": system, "Messages": messages, "Response": ""})
	each.Text = text.String()
	return err
}

func main() {
	cases := []Case{}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	for number := range cases {
		cases[number].Error = ""
		if err := render(&cases[number]); err != nil {
			cases[number].Text, cases[number].Error = "", err.Error()
		}
	}
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	out.SetIndent("", " ")
	if err := out.Encode(cases); err != nil {
		panic(err)
	}
}
